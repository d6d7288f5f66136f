"""MPT: its ALiBi leaves the eager-only attention and its length limit, with the slopes that the config states."""

import functools

import pytest
import torch
from transformers import MptForSequenceClassification, MptModel

import hfpos
from tests.families.own_attention import check_mask_is_written_out_where_needed, check_other_heads
from tests.pairs import tokens
from tests.state import logits
from tests.tiny import tiny


VARIANTS = {
    "4 heads": {},
    "3 heads": {"n_heads": 3, "d_model": 48},
    "12 heads": {"n_heads": 12, "d_model": 96},
    "its own scale": {"attn_config": {"softmax_scale": 0.1}},
    "clipped": {"attn_config": {"clip_qkv": 0.5}},
}


def stock(bias_max=8, **settings):
    """An MPT whose slopes end at `2 ** -bias_max`; as Transformers has it, only where that is 8."""
    settings["attn_config"] = {"alibi_bias_max": bias_max} | settings.get("attn_config", {})
    return tiny("mpt", **settings)


def corrected(model):
    """Stock MPT with the slopes that its config states."""
    decoder, bias_max = model.transformer, model.config.attn_config.alibi_bias_max
    decoder.build_mpt_alibi_tensor = functools.partial(decoder.build_mpt_alibi_tensor, alibi_bias_max=bias_max)
    return model


def patched(scheme="alibi", settings=None, **parameters):
    return hfpos.patch(stock(**(settings or {})), scheme, **parameters)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_same_logits_on_sdpa(variant):
    settings = VARIANTS[variant]
    expected, model = stock(**settings), patched(settings=settings)
    assert expected.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "hfpos_sdpa"
    for length in (1, 64):
        torch.testing.assert_close(logits(model, length), logits(expected, length), rtol=1e-5, atol=1e-5)
    for unseen in (slice(0, 7), slice(-7, None)):
        padding = torch.ones(2, 30, dtype=torch.long)
        padding[0, unseen] = 0
        found, wanted = (each(tokens(2, 30), attention_mask=padding).logits for each in (model, expected))
        torch.testing.assert_close(found[padding.bool()], wanted[padding.bool()], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [4, 12])
@pytest.mark.parametrize("bias_max", [4, 16])
def test_slopes_end_where_the_config_says(bias_max, heads, tmp_path):
    settings = {"n_heads": heads, "d_model": 16 * heads, "bias_max": bias_max}
    model = patched(settings=settings)
    torch.testing.assert_close(logits(model), logits(corrected(stock(**settings))), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(stock(**settings))).abs().max() > 0.1  # stock takes it for 8
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hfpos.from_pretrained(tmp_path)), logits(model))


def test_it_does_not_stop_at_its_length():
    with pytest.raises(RuntimeError, match="must match the size"):
        logits(stock(), 100)
    torch.testing.assert_close(logits(patched(), 100), logits(stock(max_seq_len=128), 100), rtol=0, atol=1e-5)
    assert patched(factor=4).config.max_seq_len == 256


def test_gradients_equal_stock():
    model, expected = patched(), stock()
    for each in (model, expected):
        each(tokens(2, 60), labels=tokens(2, 60)).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_bfloat16_is_as_near_to_float32_as_stock_is():
    exact = logits(stock(max_seq_len=700), 700)
    errors = [(logits(each.bfloat16(), 700).float() - exact).norm() for each in (patched(), stock(max_seq_len=700))]
    assert errors[0] < 1.1 * errors[1]


@torch.no_grad()
def test_weights_of_attention():
    found, expected = (each(tokens(2, 30), output_attentions=True) for each in (patched(), stock()))
    torch.testing.assert_close(found.logits, logits(patched()), rtol=0, atol=1e-5)
    for mine, theirs in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_factor_and_given_slopes():
    slopes = [slope / 4 for slope in (0.5, 0.25, 0.125, 0.0625)]  # 2 ** -1 ... 2 ** -4
    scaled = logits(patched(settings={"bias_max": 4}, factor=4))
    assert torch.equal(scaled, logits(patched(settings={"bias_max": 4}, slopes=slopes)))
    assert torch.equal(scaled, logits(patched(slopes=slopes)))  # given slopes are the slopes, whatever the config says


@pytest.mark.parametrize("scheme", ["rope", "nope", "sinusoidal", "kerple"])
def test_own_bias_is_off(scheme):
    model, expected = patched(scheme), stock()
    assert not torch.allclose(logits(model), logits(expected), atol=1e-2)
    if scheme == "nope":
        expected.transformer.build_mpt_alibi_tensor = lambda *args, **kwargs: None
        torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)


def test_a_static_cache_knows_where_padding_is():
    model = patched("sinusoidal")
    padding, ids = torch.ones(2, 20, dtype=torch.long), tokens(2, 20)
    padding[0, :6] = 0
    settings = {"attention_mask": padding, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, use_cache=True, cache_implementation="static", **settings), expected)


def test_a_mask_is_written_out_only_where_one_is_needed():
    model = patched()
    layer = model.transformer.blocks[0]
    check_mask_is_written_out_where_needed(model, layer, layer.attn)


def test_an_mpt_without_alibi_is_refused():
    with pytest.raises(hfpos.PatchError, match=r"mpt: its attn_config says alibi=False, but Transformers"):
        hfpos.patch(stock(attn_config={"alibi": False}), "alibi")


def test_other_heads_of_mpt():
    check_other_heads(stock(pad_token_id=0).config, (MptModel, MptForSequenceClassification))
