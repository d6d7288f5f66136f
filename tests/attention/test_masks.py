"""Masks that a user gives: what they hide is hidden, and what a bias cannot honour is an error, never dropped."""

import pytest
import torch

import hfpos
from hfpos.attention.masks import check_mask
from hfpos.schemes import Alibi, Kerple
from tests.attention.exact import BOTH_WAYS, SCHEMES, attend, compare, difference, example, random_weights, reference
from tests.pairs import Pair, tokens, unpatched


LENGTH = 12
PLACES = torch.arange(LENGTH)[None]
FAR = torch.finfo(torch.float32).min
causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
holes = causal & ~(torch.arange(LENGTH) % 5 == 1) | torch.eye(LENGTH, dtype=torch.bool)


def additive(visible: torch.Tensor, low: float = FAR, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The mask (1, 1, Q, K) that is 0 where `visible`, else `low`."""
    return torch.zeros(1, 1, *visible.shape, dtype=dtype).masked_fill(~visible, low)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("scheme", ["alibi", "kerple", "fire", "shaw"])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@torch.no_grad()
def test_holes_in_a_mask_of_any_form(model_type: str, scheme: str, backend: str) -> None:
    model, other = Pair(model_type, scheme).model(), Pair(model_type, scheme).model()
    for each in (model, other):
        each.config._attn_implementation = backend
    ids = tokens(1, LENGTH)
    results = [
        model(ids, attention_mask=mask, position_ids=PLACES).logits
        for mask in (holes[None, None], additive(holes), additive(holes, float("-inf")), additive(holes, -2e38))
    ]
    for logits in results[1:]:
        assert difference(logits, results[0].double()) < 1e-5
    assert difference(results[0], model(ids).logits.double()) > 1e-3
    changed = ids.clone()
    changed[0, 6] = ids[0, 6] % 100 + 3  # a key that only its own query sees
    moved = (model(changed, attention_mask=holes[None, None], position_ids=PLACES).logits - results[0]).abs().amax(-1)[
        0
    ] > 1e-6
    assert moved.nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_mask_for_each_head_and_row(name: str) -> None:
    given = example(40)
    generator = torch.Generator().manual_seed(0)
    given.visible = given.visible & (torch.rand(2, 4, 40, 40, generator=generator) < 0.6) | torch.eye(40).bool()
    compare(name, given.with_mask())
    compare(name, given.with_mask(), "eager")


@pytest.mark.parametrize("scheme", ["alibi", "kerple", "fire", "t5", "sandwich", "shaw"])
@pytest.mark.parametrize("model_type", ["llama", "bloom"])
@torch.no_grad()
def test_a_mask_that_adds_numbers_is_refused(model_type: str, scheme: str) -> None:
    model = Pair(model_type, scheme).model()
    for mask in (additive(causal) - 0.5 * causal, additive(causal, -10_000.0), additive(causal) + causal):
        with pytest.raises(hfpos.PatchError, match=f"^{scheme}: the attention mask adds numbers of its own.*boolean"):
            model(tokens(1, LENGTH), attention_mask=mask, position_ids=PLACES)


@pytest.mark.parametrize("form", [lambda x: x[None, None], additive], ids=["boolean", "additive"])
@torch.no_grad()
def test_a_mask_that_shows_the_future(form) -> None:
    prefix = causal.clone()
    prefix[:5, :5] = True  # of a prefix model
    mask, ids = form(prefix), tokens(1, LENGTH)
    for scheme, parameters in (("alibi", {}), ("t5", {})):
        for model_type in ("llama", "gpt2", "bloom"):
            model = Pair(model_type, scheme, parameters).model()
            with pytest.raises(hfpos.PatchError, match=f"^{scheme}: .*not causal.*pass bidirectional=True"):
                model(ids, attention_mask=mask)
            model(ids, attention_mask=form(causal))
    with pytest.raises(hfpos.PatchError, match="^fire: .*not causal.*such as kerple") as error:
        Pair("llama", "fire").model()(ids, attention_mask=mask)
    assert "bidirectional" not in str(error.value)
    for name in BOTH_WAYS:
        given = example(LENGTH)
        given.visible = prefix[None, None]
        expected = reference(name, given, random_weights(name))
        for backend in ("sdpa", "eager"):
            assert difference(attend(name, given.with_mask(), random_weights(name), backend), expected) < 1e-5


@pytest.mark.parametrize("scheme", ["alibi", "fire"])
def test_a_model_that_is_not_causal_is_refused(scheme: str) -> None:
    for backend in ("sdpa", "eager", *(["flex"] if scheme == "alibi" else [])):
        with pytest.raises(hfpos.PatchError, match=f"^{scheme}: attention here is not causal"):
            hfpos.patch(unpatched("llama", is_causal=False), scheme, backend=backend)(tokens(1, LENGTH))


def test_steps_of_a_static_cache_look_at_the_keys_that_are_there() -> None:
    """Of 20 slots, 12 are filled, the last 4 by this call."""
    slots = torch.arange(20)
    visible = (slots <= torch.arange(8, 12)[:, None])[None, None]
    for total in (12, torch.tensor(12)):
        assert check_mask(Alibi(), visible, True, 4, total, {}) is visible
        with pytest.raises(hfpos.PatchError, match="not causal"):
            check_mask(Alibi(), torch.roll(visible, 1, -1) | visible, True, 4, total, {})
    assert check_mask(Kerple(), torch.ones_like(visible), True, 4, 12, {}).all()
    window = visible[..., 6:12] & (slots[6:12] > torch.arange(8, 12)[:, None] - 3)
    assert check_mask(Alibi(), window, True, 4, 12, {}) is window  # a layer that keeps its last 6 keys


def test_a_mask_is_looked_at_once_in_a_forward() -> None:
    memo: dict = {}
    first = check_mask(Alibi(), additive(causal), True, LENGTH, LENGTH, memo)
    mask = additive(causal)
    second = check_mask(Alibi(), mask, True, LENGTH, LENGTH, memo)
    assert check_mask(Alibi(), mask, True, LENGTH, LENGTH, memo) is second
    assert first is not second
    assert first.dtype == second.dtype == torch.bool


def test_masks_of_other_shapes_are_refused() -> None:
    for mask in (causal, causal[None]):
        with pytest.raises(
            hfpos.PatchError,
            match=r"alibi: the attention mask has shape \((1, )?12, 12\); expected \(batch, 1 or heads",
        ):
            check_mask(Alibi(), mask, True, LENGTH, LENGTH, {})


@pytest.mark.parametrize("scheme", ["alibi", "kerple"])
@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex"])
def test_a_second_bias_is_refused(scheme: str, backend: str) -> None:
    model = hfpos.patch(unpatched("llama"), scheme, prove=False, backend=backend)
    with pytest.raises(
        hfpos.PatchError, match=f"was given a position_bias, and '{scheme}' is a bias already.*unpatch"
    ):
        model(tokens(1, LENGTH), position_bias=torch.zeros(1, 4, LENGTH, LENGTH))


def test_a_paged_cache_is_refused() -> None:
    given = example(4)
    with pytest.raises(hfpos.PatchError, match="paged cache .continuous batching.*generate without it"):
        attend("alibi", given, {}, cache=object())


def test_mask_of_another_length_is_an_error() -> None:
    model = Pair("llama", "kerple").model()
    with pytest.raises((hfpos.PatchError, RuntimeError)):
        model(tokens(1, LENGTH), attention_mask=causal[None, None, :5, :5])
