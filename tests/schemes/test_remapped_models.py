"""ReRoPE, dual chunk, LM-Infinite, StreamingLLM, Self-Extend and xPos in models: decoded, padded, saved, trained."""

import json
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

import hfpos
from hfpos.scheme import PatchError
from tests import pairs
from tests.pairs import ROTARY, difference, tokens, unpatched
from tests.reference import llama_logits
from tests.schemes.remapping import SCHEMES, scores


REMAPPINGS = [name for name in SCHEMES if name != "xpos"]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@torch.no_grad()
def test_a_patched_llama_equals_its_definition(name: str, backend: str) -> None:
    scheme, parameters = SCHEMES[name]
    model = hfpos.patch(unpatched("llama"), scheme, **parameters, backend=backend)
    ids, positions = tokens(1, 90), torch.arange(90)
    reference = llama_logits(model, ids, lambda q, k: scores(name, q, k, positions, positions) / 4)
    assert difference(model(ids).logits.double(), reference) < 5e-5


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_gpt2_gets_a_rotation_by_it(name: str) -> None:
    scheme, parameters = SCHEMES[name]
    model = hfpos.patch(unpatched("gpt2"), scheme, **parameters)
    ids, mask = tokens(2, 70), torch.ones(2, 70, dtype=torch.long)
    mask[1, :9] = 0
    expected = model(ids, attention_mask=mask).logits
    assert difference(expected[1:, 9:], model(ids[1:, 9:]).logits) < 2e-5
    first = model(ids[:, :30], attention_mask=mask[:, :30], use_cache=True)
    rest = model(ids[:, 30:], attention_mask=mask, past_key_values=first.past_key_values).logits
    assert difference(rest, expected[:, 30:]) < 2e-5
    assert difference(expected, model(ids[:, torch.arange(70).roll(1)], attention_mask=mask).logits) > 1e-2


@pytest.mark.parametrize("model_type", ROTARY)
@pytest.mark.parametrize("name", REMAPPINGS)
@torch.no_grad()
def test_no_longer_than_the_window_is_the_stock_model_bit_for_bit(name: str, model_type: str) -> None:
    scheme, parameters = SCHEMES[name]
    length = parameters.get("window") or parameters["chunk_size"]
    stock, model = unpatched(model_type), hfpos.patch(unpatched(model_type), scheme, **parameters)
    ids = tokens(2, length)
    assert torch.equal(model(ids).logits, stock(ids).logits)
    padded, mask = pad(ids, (3, 0)), pad(torch.ones_like(ids), (3, 0))
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    assert torch.equal(model(padded, **given).logits, stock(padded, **given).logits)
    caches: list[Any] = [None, None]
    for now in (slice(0, length - 2), slice(length - 2, length - 1), slice(length - 1, length)):
        outputs = [
            each(ids[:, now], past_key_values=cache) for each, cache in zip((model, stock), caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
    longer = tokens(2, 60)
    if model_type != "mistral":  # whose own window is shorter
        assert difference(model(longer).logits, stock(longer).logits) > 1e-3


@pytest.mark.parametrize("name", SCHEMES)
def test_saved_and_loaded(name: str, tmp_path: Any) -> None:
    scheme, parameters = SCHEMES[name]
    model, ids = hfpos.patch(unpatched("llama"), scheme, **parameters), tokens(1, 60)
    model.save_pretrained(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text(), parse_constant=lambda name: pytest.fail(name))["hfpos"]
    assert hfpos.schemes()[scheme].create(**block["parameters"]) == hfpos.schemes()[scheme].create(**parameters)
    loaded = hfpos.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(hfpos.unpatch(loaded)(ids).logits, unpatched("llama")(ids).logits)


@torch.no_grad()
def test_xpos_is_for_causal_attention() -> None:
    model = hfpos.patch(unpatched("llama"), "xpos")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config.is_causal = False
    with pytest.raises(PatchError, match="lets tokens see those behind them, for which the decay would be a growth"):
        model(tokens(1, 9))


@pytest.mark.parametrize("name", SCHEMES)
def test_training_in_bfloat16_with_checkpointing(name: str) -> None:
    scheme, parameters = SCHEMES[name]
    model = pairs.checkpointing(hfpos.patch(unpatched("llama"), scheme, **parameters))
    ids = tokens(2, 70)
    plain = hfpos.patch(unpatched("llama"), scheme, **parameters)
    for each in (model, plain):
        each(ids, labels=ids).loss.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert difference(one.grad, other.grad) < 1e-5
    half = plain.bfloat16()
    logits = half(ids).logits
    assert difference(logits.float(), model.eval()(ids).logits) < 0.15 * model(ids).logits.abs().max()
