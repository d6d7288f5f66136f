"""Falcon with ALiBi: its bias is added once and exactly, on the attention interface, and may be replaced."""

import pytest
import torch
from transformers import FalconForSequenceClassification, FalconModel
from transformers.models.falcon import modeling_falcon

import hfpos
from tests.families.own_attention import check_mask_is_written_out_where_needed, check_other_heads
from tests.pairs import tokens
from tests.state import logits
from tests.tiny import tiny


VARIANTS = {
    "one key head": {},
    "a key head each": {"multi_query": False, "num_kv_heads": 4},
    "grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon-rw": {"multi_query": False, "num_kv_heads": 4, "parallel_attn": False, "bias": True},
    "12 heads": {"num_attention_heads": 12, "hidden_size": 96},
    "71 heads": {"num_attention_heads": 71, "hidden_size": 568, "num_hidden_layers": 1},
}


def stock(backend="sdpa", **settings):
    """A Falcon with ALiBi."""
    model = tiny("falcon", alibi=True, **settings)
    model.config._attn_implementation = backend
    return model


def patched(scheme="alibi", settings=None, **parameters):
    return hfpos.patch(stock(**(settings or {})), scheme, **parameters)


@pytest.fixture
def unrounded(monkeypatch):
    """Stock Falcon makes its bias in float32."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)


def scaled_bias(monkeypatch, factor):
    """Stock Falcon makes its bias `factor` times as large."""
    original = modeling_falcon.build_alibi_tensor
    monkeypatch.setattr(
        modeling_falcon, "build_alibi_tensor", lambda *args, **kwargs: original(*args, **kwargs) * factor
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("unrounded")
@torch.no_grad()
def test_same_logits_as_stock_that_does_not_round(variant):
    settings = VARIANTS[variant]
    expected, model = stock(**settings), patched(settings=settings)
    assert model.config._attn_implementation == "hfpos_sdpa"
    for length in (1, 300):
        torch.testing.assert_close(logits(model, length), logits(expected, length), rtol=1e-5, atol=2e-5)
    for unseen in (slice(0, 7), slice(-7, None)):
        padding = torch.ones(2, 30, dtype=torch.long)
        padding[0, unseen] = 0
        found, wanted = (each(tokens(2, 30), attention_mask=padding).logits for each in (model, expected))
        torch.testing.assert_close(found[padding.bool()], wanted[padding.bool()], rtol=1e-5, atol=2e-5)


def test_stock_rounds_its_bias():
    difference = (logits(patched(), 300) - logits(stock(), 300)).abs().max()
    assert 1e-3 < difference < 0.3  # at 256 tokens, bfloat16 begins to lose positions


@pytest.mark.usefixtures("unrounded")
def test_stock_eager_adds_its_bias_twice(monkeypatch):
    once = patched(settings={"backend": "eager"})
    assert once.config._attn_implementation == "hfpos_eager"
    twice = patched(slopes=[2 * slope / 4 for slope in hfpos.schemes()["alibi"]().head_slopes(4)])  # 4: sqrt(head_dim)
    torch.testing.assert_close(logits(twice), logits(stock("eager")), rtol=0, atol=1e-5)
    scaled_bias(monkeypatch, 0.5)
    torch.testing.assert_close(logits(once), logits(stock("eager")), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("unrounded")
@torch.no_grad()
def test_weights_of_attention(monkeypatch):
    scaled_bias(monkeypatch, 0.5)  # which stock adds twice
    found, expected = (each(tokens(2, 30), output_attentions=True) for each in (patched(), stock("eager")))
    torch.testing.assert_close(found.logits, logits(patched()), rtol=0, atol=1e-5)
    for mine, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert mine.shape == theirs.shape == (2, 4, 30, 30)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("unrounded")
def test_gradients_equal_stock():
    model, expected = patched(), stock()
    for each in (model, expected):
        each(tokens(2, 60), labels=tokens(2, 60)).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_is_nearer_to_float32_than_stock_is():
    settings = {"num_attention_heads": 8, "hidden_size": 128}
    exact = logits(patched(settings=settings), 1000)
    models = patched(settings=settings), stock(**settings)
    errors = [(logits(each.bfloat16(), 1000).float() - exact).norm() for each in models]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.usefixtures("unrounded")
def test_factor_and_given_slopes(monkeypatch):
    slopes = [slope / 16 for slope in (0.25, 0.0625, 0.015625, 0.00390625)]  # over the factor and sqrt(head_dim)
    scaled = logits(patched(factor=4))
    assert torch.equal(scaled, logits(patched(slopes=slopes)))
    scaled_bias(monkeypatch, 0.25)
    torch.testing.assert_close(scaled, logits(stock()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["rope", "nope", "sinusoidal", "kerple"])
def test_own_bias_is_off(scheme, monkeypatch):
    model = patched(scheme)
    assert not torch.allclose(logits(model), logits(stock()), atol=1e-2)
    if scheme == "nope":
        scaled_bias(monkeypatch, 0.0)
        torch.testing.assert_close(logits(model), logits(stock()), rtol=0, atol=1e-5)


def test_a_mask_is_written_out_only_where_one_is_needed():
    model = patched()
    layer = model.transformer.h[0]
    check_mask_is_written_out_where_needed(model, layer, layer.self_attention)


@pytest.mark.parametrize("variant", ["one key head", "grouped"])
@torch.no_grad()
def test_the_cache_is_laid_out_as_in_stock(variant):
    settings = VARIANTS[variant]
    model, ids = patched(settings=settings), tokens(2, 30)
    first = model(ids[:, :20], use_cache=True).past_key_values
    expected = stock(**settings)(ids[:, :20], use_cache=True).past_key_values
    torch.testing.assert_close(first.layers[0].keys, expected.layers[0].keys, rtol=0, atol=1e-6)
    steps = [model(ids[:, i : i + 1], past_key_values=first, use_cache=True).logits for i in range(20, 30)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits[:, 20:], rtol=0, atol=1e-5)


def test_a_falcon_that_rotates_is_another_family():
    model = tiny("falcon")
    assert hfpos.describe(model).family == "falcon_rotary"
    assert hfpos.describe(hfpos.patch(model, "yarn", factor=4)).proved


@pytest.mark.usefixtures("unrounded")
def test_other_heads_of_falcon():
    check_other_heads(stock(pad_token_id=0).config, (FalconModel, FalconForSequenceClassification))
