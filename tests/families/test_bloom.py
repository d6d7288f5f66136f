"""BLOOM: its ALiBi leaves the eager-only attention, and may be replaced."""

import pytest
import torch

import hfpos
from tests.families.own_attention import check_other_heads
from tests.pairs import Pair, tokens, unpatched
from tests.state import logits


@pytest.mark.parametrize("heads", [4, 3, 6, 12])
def test_same_logits_on_sdpa(heads):
    settings = {"n_head": heads, "hidden_size": 16 * heads}
    stock, model = unpatched("bloom", **settings), hfpos.patch(unpatched("bloom", **settings), "alibi")
    assert stock.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "hfpos_sdpa"
    for length in (1, 30, 100):
        torch.testing.assert_close(logits(model, length), logits(stock, length), rtol=0, atol=1e-5)
    padding = torch.ones(2, 30, dtype=torch.long)
    padding[0, :7] = 0
    with torch.no_grad():
        padded = [each(tokens(2, 30), attention_mask=padding).logits for each in (model, stock)]
    torch.testing.assert_close(padded[0][padding.bool()], padded[1][padding.bool()], rtol=0, atol=1e-5)


def test_bfloat16_is_nearer_to_float32_than_stock_is():
    settings = {"n_head": 8, "hidden_size": 128}
    exact = logits(unpatched("bloom", **settings), 700)
    stock = logits(unpatched("bloom", **settings).bfloat16(), 700).float()
    model = logits(hfpos.patch(unpatched("bloom", **settings).bfloat16(), "alibi"), 700).float()
    errors = [((found - exact).norm() / exact.norm()).item() for found in (model, stock)]
    assert errors[0] < 0.5 * errors[1]


def test_factor_divides_the_slopes():
    scaled = Pair("bloom", "alibi", {"factor": 4}).model()
    given = Pair("bloom", "alibi", {"slopes": [slope / 4 for slope in (0.25, 0.0625, 0.015625, 0.00390625)]}).model()
    assert torch.equal(logits(scaled, 60), logits(given, 60))
    # dense ALiBi with a quarter of the distance: stock attention at positions divided by four
    stock = unpatched("bloom")
    original = stock.transformer.build_alibi_tensor
    stock.transformer.build_alibi_tensor = lambda *args, **kwargs: original(*args, **kwargs) / 4
    torch.testing.assert_close(logits(scaled, 60), masked_logits(stock), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["rope", "nope", "sinusoidal"])
def test_own_bias_is_off(scheme):
    model = Pair("bloom", scheme).model()
    stock = unpatched("bloom")
    assert not torch.allclose(logits(model, 60), logits(stock, 60), atol=1e-2)
    if scheme == "nope":
        stock.transformer.build_alibi_tensor = lambda mask, heads, dtype: torch.zeros(
            mask.shape[0] * heads, 1, mask.shape[1], dtype=dtype
        )
        torch.testing.assert_close(logits(model, 60), masked_logits(stock), rtol=0, atol=1e-5)


@torch.no_grad()
def masked_logits(model):
    """Stock BLOOM calls its method for the bias only where there is a mask."""
    return model(tokens(2, 60), attention_mask=torch.ones(2, 60, dtype=torch.long)).logits


def test_weights_of_attention():
    for scheme in ("alibi", "rope"):
        model = hfpos.patch(unpatched("bloom"), scheme)
        stock = unpatched("bloom")
        with torch.no_grad():
            found, expected = (each(tokens(2, 30), output_attentions=True) for each in (model, stock))
        torch.testing.assert_close(found.logits, logits(model), rtol=0, atol=1e-5)
        for mine, theirs in zip(found.attentions, expected.attentions, strict=True):
            assert mine.shape == theirs.shape == (2, 4, 30, 30)
            if scheme == "alibi":
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_gradients_equal_stock():
    model, stock = hfpos.patch(unpatched("bloom"), "alibi"), unpatched("bloom")
    for each in (model, stock):
        each(tokens(2, 60), labels=tokens(2, 60)).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_other_heads_of_bloom():
    from transformers import BloomForSequenceClassification, BloomModel

    config = unpatched("bloom").config
    config.pad_token_id = 0
    check_other_heads(config, (BloomModel, BloomForSequenceClassification))
