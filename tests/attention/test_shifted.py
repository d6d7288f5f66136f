"""Shifted sparse attention in models: in training alone, beside patches, PEFT, checkpointing, and whatever else they are put to."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hfpos
from hfpos.attention.flash import flash_attention
from hfpos.attention.shifted import shift_attention
from hfpos.scheme import PatchError
from tests.attention.test_flash import Flash
from tests.attention.test_shifted_groups import GROUP, who_sees_whom
from tests.pairs import difference, tokens
from tests.tiny import tiny


def loss(model: Any, ids: torch.Tensor, **given: Any) -> torch.Tensor:
    """Of the next tokens, all counted."""
    return model(ids, labels=ids, **given).loss


def shifted(model_type: str = "llama", **overrides: Any) -> Any:
    """A tiny model in training, in groups of 16."""
    model = tiny(model_type, **overrides)
    shift_attention(model, group_size=GROUP)
    return model.train()


NO_DROPOUT = {
    "gpt2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "opt": {"dropout": 0.0},  # a model of no family that hfpos knows
}


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi", "gemma3_text", "opt"]
)
@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_models(model_type: str, stock: str) -> None:
    model = tiny(model_type, **NO_DROPOUT.get(model_type, {}))
    model.set_attn_implementation(stock)
    ids, mask = tokens(2, 50), torch.ones(2, 50, dtype=torch.int64)
    mask[1, 41:] = 0
    full = model(ids, attention_mask=mask).logits
    handle = shift_attention(model, group_size=GROUP)
    assert torch.equal(model(ids, attention_mask=mask).logits, full)
    model.train()
    logits = model(ids, attention_mask=mask).logits
    assert difference(logits[:, :8], full[:, :8].double()) < 1e-4  # the first half group is the same in all heads
    assert difference(logits[:, 20:41], full[:, 20:41].double()) > 1e-3
    assert difference(logits[1:, :41], model(ids[1:, :41]).logits.double()) < 1e-4
    assert torch.equal(model.eval()(ids, attention_mask=mask).logits, full)
    handle.remove()
    assert torch.equal(model(ids, attention_mask=mask).logits, full)
    assert model.config._attn_implementation == stock


def with_rule(model: Any, ids: torch.Tensor, document: torch.Tensor | None = None, window: int | None = None) -> Any:
    """The logits of a stock model by whose masks, one for each head, tokens see what the definition lets them see."""
    heads, length = model.config.num_attention_heads, ids.shape[1]
    document = torch.zeros_like(ids) if document is None else document
    seen = who_sees_whom(length, GROUP, heads, torch.ones_like(ids, dtype=torch.bool), document)
    at = torch.arange(length)
    if window is not None:
        seen = seen & (at[:, None] - at < window)
    begins = torch.nn.functional.pad(document.diff() != 0, (1, 0))
    return model(ids, attention_mask=seen, position_ids=at - torch.where(begins, at, 0).cummax(-1).values).logits


def checkpoint(model: Any, reentrant: bool) -> None:
    """Switch gradient checkpointing on."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_model_equals_the_definition(checkpointing: bool | None) -> None:
    model = hfpos.patch(tiny("llama", num_key_value_heads=1).double(), "yarn", factor=2)
    other = copy.deepcopy(model)
    shift_attention(model, group_size=GROUP)
    model.train()
    if checkpointing is not None:
        checkpoint(model, checkpointing)
        model.enable_input_require_grads()
    ids = tokens(2, 90)
    document = (torch.arange(90) > 37).long().expand(2, -1)
    places = torch.where(document == 1, torch.arange(90) - 38, torch.arange(90))
    for given, rule in (({}, None), ({"position_ids": places}, document)):
        found, expected = model(ids, **given).logits, with_rule(other, ids, rule)
        assert (found - expected).abs().max() < 1e-9
        for each, logits in ((model, found), (other, expected)):
            each.zero_grad()
            logits.square().mean().backward()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert (one.grad - two.grad).abs().max() < 1e-9


def test_checkpointing_computes_again_what_was_computed_whatever_the_mode_is_by_then() -> None:
    grads = []
    for eval_between in (False, True):
        model = shifted()
        checkpoint(model, False)
        value = loss(model, tokens(1, 50))
        if eval_between:
            model.eval()(tokens(1, 50))
        value.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("window", [12, 40])  # within a group and beyond it
def test_sliding_windows(window: int) -> None:
    model = tiny("mistral", sliding_window=window).double()
    other = copy.deepcopy(model)
    shift_attention(model, group_size=GROUP)
    ids = tokens(1, 60)
    assert (model.train()(ids).logits - with_rule(other, ids, window=window)).abs().max() < 1e-9


def test_a_row_comes_out_the_same_however_it_is_padded() -> None:
    model, ids = shifted(), tokens(1, 41)
    alone = model(ids).logits
    for front, behind in ((9, 0), (0, 30), (100, 7)):
        mask = torch.nn.functional.pad(torch.ones_like(ids), (front, behind))
        padded = torch.nn.functional.pad(ids, (front, behind), value=3)
        batch = torch.cat((padded, tokens(1, padded.shape[1])))  # beside one without padding
        logits = model(batch, attention_mask=torch.cat((mask, torch.ones_like(mask)))).logits
        assert difference(logits[:1, front : front + 41], alone.double()) < 1e-4
        assert torch.isfinite(logits).all()


def test_groups_by_their_number() -> None:
    model, other = tiny("llama"), tiny("llama")
    handle = shift_attention(model, 4)
    shift_attention(other, group_size=18)
    assert handle.length(70) == 18
    assert torch.equal(model.train()(tokens(1, 70)).logits, other.train()(tokens(1, 70)).logits)


def test_a_short_row_attends_in_full() -> None:
    model = shifted()
    ids = tokens(1, GROUP)
    assert difference(model(ids).logits, model.eval()(ids).logits.double()) < 1e-5


def test_bfloat16_and_autocast() -> None:
    exact = shifted()(tokens(1, 50)).logits
    model = shifted().bfloat16()
    assert difference(model(tokens(1, 50)).logits, exact.double()) < 0.3
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(shifted()(tokens(1, 50)).logits, exact.double()) < 0.3


def test_attention_dropout_acts() -> None:
    model = shifted(attention_dropout=0.5)
    assert not torch.equal(model(tokens(1, 50)).logits, model(tokens(1, 50)).logits)


def test_other_models_and_saved_ones_know_nothing_of_it(tmp_path: Path) -> None:
    config = tiny("llama").config
    model, other = (type(tiny("llama"))(config) for _ in range(2))
    other.load_state_dict(model.state_dict())
    full = other.train()(tokens(1, 50)).logits
    shift_attention(model, group_size=GROUP)
    cut = model.train()(tokens(1, 50)).logits
    assert torch.equal(other(tokens(1, 50)).logits, full)
    assert config._attn_implementation == "sdpa"
    other.save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "model")
    assert len({(tmp_path / name / "config.json").read_text() for name in ("other", "model")}) == 1
    assert torch.equal(type(model).from_pretrained(tmp_path / "model").train()(tokens(1, 50)).logits, full)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(tokens(1, 50)).logits, cut)
        again.hfpos_shifted.remove()
        assert torch.equal(again(tokens(1, 50)).logits, full)
    assert torch.equal(model(tokens(1, 50)).logits, cut)


def test_patches_before_after_and_around_it() -> None:
    ids = tokens(1, 100)
    expected = tiny("llama")
    shift_attention(hfpos.patch(expected, "yarn", factor=2), group_size=GROUP)
    cut = expected.train()(ids).logits
    model = tiny("llama")
    plain = model(ids).logits
    handle = shift_attention(model, group_size=GROUP)
    unpatched = model.train()(ids).logits
    hfpos.patch(model, "ntk", factor=2)
    hfpos.patch(model, "yarn", factor=2)
    assert torch.equal(model(ids).logits, cut)
    assert "yarn" in str(hfpos.describe(model))
    hfpos.unpatch(model)
    assert torch.equal(model(ids).logits, unpatched)
    hfpos.patch(model, "yarn", factor=2)
    handle.remove()
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    hfpos.unpatch(model)
    assert torch.equal(model.eval()(ids).logits, plain)
    assert model.config._attn_implementation == "sdpa"

    hfpos.patch(model, "yarn", factor=2)
    handle = shift_attention(model, group_size=GROUP)
    hfpos.unpatch(model)
    assert torch.equal(model.train()(ids).logits, unpatched)
    with hfpos.patched(model, "yarn", factor=2):
        assert torch.equal(model(ids).logits, cut)
    assert torch.equal(model(ids).logits, unpatched)
    model.set_attn_implementation("eager")  # what it then stands on
    assert difference(model(ids).logits, unpatched.double()) < 1e-5
    handle.remove()
    assert model.config._attn_implementation == "eager"


def test_shifting_anew() -> None:
    model = shifted()
    cut = model(tokens(1, 50)).logits
    second = shift_attention(model, group_size=8)
    assert not torch.equal(model(tokens(1, 50)).logits, cut)
    second.remove()
    assert torch.equal(model(tokens(1, 50)).logits, tiny("llama").train()(tokens(1, 50)).logits)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("first", [True, False])
def test_peft(first: bool) -> None:
    model, lora = tiny("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    if first:
        model = get_peft_model(model, lora)
    shift_attention(model, group_size=GROUP)
    if not first:
        model = get_peft_model(model, lora)
    assert torch.equal(model.train()(tokens(1, 50)).logits, shifted()(tokens(1, 50)).logits)
    loss(model, tokens(1, 50)).backward()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad.abs().max() > 0


def test_it_leaves_no_trace_of_its_proof() -> None:
    model = tiny("llama").train()
    model.model.layers[0].eval()
    torch.manual_seed(0)
    shift_attention(model, groups=4)
    assert torch.initial_seed() == 0
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))
    assert (model.training, model.model.layers[0].training, model.model.layers[1].training) == (True, False, True)


def test_on_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = Flash()
    monkeypatch.setattr("hfpos.attention.flash._flash_attention_forward", flash.forward)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash_attention)
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[0, :7] = 0
    found = []
    for name in ("sdpa", "flash_attention_2"):
        model = tiny("llama")
        model.config._attn_implementation = name
        shift_attention(model, group_size=GROUP)
        flash.calls.clear()
        cut = model.train()(tokens(2, 50), attention_mask=mask).logits
        assert not flash.calls
        found.append((cut, model.eval()(tokens(2, 50), attention_mask=mask).logits))
        assert bool(flash.calls) == (name != "sdpa")
    for one, other in zip(*found, strict=True):
        assert difference(one[mask == 1], other[mask == 1].double()) < 1e-4


def test_eval_mode_compiles_in_one_piece() -> None:
    model, stock = shifted(num_hidden_layers=1), tiny("llama", num_hidden_layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens(1, 50)).logits, stock(tokens(1, 50)).logits)
    with pytest.raises(PatchError, match="compiled"):
        shift_attention(compiled, groups=4)


def test_generation_in_eval_mode_is_stock() -> None:
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model, ids = shifted(), tokens(2, 20)
    model(ids)
    for cache in ("dynamic", "static"):
        wanted = tiny("llama").generate(ids, cache_implementation=cache, **settings)
        assert torch.equal(model.eval().generate(ids, cache_implementation=cache, **settings), wanted)
