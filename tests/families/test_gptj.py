"""GPT-J and CodeGen: interleaved pairs of a part of each head, at any length."""

import peft
import pytest
import torch
from transformers import GPTJForSequenceClassification, GPTJModel
from transformers.models.gptj.modeling_gptj import create_sinusoidal_positions

import hfpos
from hfpos.scheme import Geometry
from hfpos.schemes.yarn import Yarn
from tests.pairs import tokens, unpatched
from tests.state import logits


MODEL_TYPES = ("gptj", "codegen")
YARN = {"factor": 4.0}


def stock(model_type, table=None, **settings):
    """A stock model that rotates 8 of 16 dimensions of a head; with another `table` of sin and cos, of any length."""
    model = unpatched(model_type, rotary_dim=8, **settings)
    for layer in model.transformer.h if table is not None else ():
        layer.attn.embed_positions = table
    return model


def scaled_table():
    """sin and cos of 200 positions, at YaRN's frequencies and with its temperature."""
    numbers = Geometry(heads=4, head_dim=16, rotary_dim=8, theta=1e4, trained_length=32, allowed_length=32)
    frequencies, scale = Yarn(**YARN).frequencies(numbers)
    angles = torch.arange(200, dtype=torch.float64)[:, None] * frequencies
    return (torch.cat((angles.sin(), angles.cos()), dim=1) * scale).float()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_scaled_it_equals_stock_with_a_scaled_table(model_type):
    expected, model = stock(model_type, scaled_table()), hfpos.patch(stock(model_type), "yarn", **YARN)
    torch.testing.assert_close(logits(model, 199), logits(expected, 199), rtol=0, atol=3e-5)
    found, wanted = (each(tokens(1, 40), output_attentions=True).attentions for each in (model, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (model.config.max_position_embeddings, model.config.n_positions) == (128, 128)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("scheme", ["rope", "dynamic"])
def test_within_the_trained_length_it_equals_stock(model_type, scheme):
    model = hfpos.patch(stock(model_type), scheme)
    torch.testing.assert_close(logits(model), logits(stock(model_type)), rtol=0, atol=2e-5)
    longer = logits(stock(model_type, create_sinusoidal_positions(80, 8)), 80)
    assert (scheme == "rope") == torch.allclose(logits(model, 80), longer, atol=1e-3)


def test_theta_is_not_in_its_config_and_can_be_changed():
    model = hfpos.patch(stock("gptj"), "abf", theta=1e6)
    angles = torch.arange(60.0)[:, None] * 1e6 ** (-torch.arange(0, 8, 2) / 8)
    expected = stock("gptj", torch.cat((angles.sin(), angles.cos()), dim=1))
    torch.testing.assert_close(logits(model, 60), logits(expected, 60), rtol=0, atol=3e-5)


@torch.no_grad()
def test_lora_on_its_projections():
    model = peft.get_peft_model(
        hfpos.patch(stock("gptj"), "linear", factor=2.0), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.normal_()
    found = model(tokens(2, 50)).logits
    assert not torch.allclose(found, logits(hfpos.patch(stock("gptj"), "linear", factor=2.0), 50), atol=1e-2)
    torch.testing.assert_close(model.merge_and_unload()(tokens(2, 50)).logits, found, rtol=0, atol=1e-4)


def test_other_heads():
    torch.manual_seed(0)
    config = stock("gptj", pad_token_id=0).config
    for cls in (GPTJModel, GPTJForSequenceClassification):
        model = cls(config).eval()
        with torch.no_grad():
            before = model(tokens(2, 30))[0]
            found = hfpos.patch(model, "rope")(tokens(2, 30))[0]
        torch.testing.assert_close(found, before, rtol=0, atol=1e-5)
