"""flex_attention: outputs against float64, how often it is compiled, what it refuses, and models that stand on it.

Its graphs are captured as ever, but run without generated code, which takes 5 seconds each: one test has that, too.
"""

import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import hfpos
from tests.attention.exact import (
    RELATIVE,
    SCHEMES,
    Example,
    attend,
    difference,
    example,
    random_weights,
    reference,
    taken,
)
from tests.attention.test_blocks import chunk, gap, packing, padding, rows_apart, window
from tests.pairs import Pair, tokens, trained, unpatched


__all__ = ["taken"]
LENGTH = 40
FAMILIES = ["llama", "gpt2", "bloom"]


@pytest.fixture(autouse=True)
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many graphs have been compiled since the test began."""

    @functools.cache
    def compiled(function: Callable = flex_attention) -> Callable:
        return torch.compile(function, dynamic=True, backend="eager")

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if "generated" not in request.node.name:
        monkeypatch.setattr("hfpos.attention.flex._compiled", compiled)
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def check(name: str, given: Example, bound: float = 1e-5) -> None:
    weights = random_weights(name)
    with torch.no_grad():
        output = attend(name, given, weights, "flex_attention")
    assert output.dtype == given.tensors[0].dtype
    assert (((output.double() - reference(name, given, weights)) * given.real()).abs().max()) < bound


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_generated_code() -> None:
    check("kerple", padding())


def test_no_graph_for_another_length_scheme_or_layer(graphs: Any, taken: list[str]) -> None:
    for length in (
        257,
        255,
        100,
        99,
    ):  # within a block of 128 queries and beyond, and from the second on not as a constant
        check("kerple", example(length, batch=1))
    check("kerple", gap())
    check("kerple", padding())
    before = graphs()
    for length in (256, 1025, 7, 300, 2, 513):
        check("kerple", example(length, batch=1))
    for name in RELATIVE:
        check(name, example(130, batch=1))
        check(name, padding())
    assert graphs() == before <= 6
    assert set(taken) == {"flex"}


@pytest.mark.parametrize("case", [window, padding, packing, gap, rows_apart, chunk])
def test_masks_and_positions(case: Callable[[], Example]) -> None:
    check("kerple", case())


@pytest.mark.filterwarnings("error:flex_attention called without torch.compile")
def test_many_kinds_of_calls_are_compiled_all_the_same(graphs: Any) -> None:
    """torch gives up compiling a function that was compiled 8 times, and falls back to one that holds all logits."""
    everything = example(100)
    everything.visible, everything.causal = torch.ones_like(everything.visible), False
    cases = [example(300), everything, padding(), example(3, batch=1), chunk()]
    for softcap in (None, 50.0):
        for given in cases:
            given.options = {"softcap": softcap}
            with torch.no_grad():
                attend("kerple", given, random_weights("kerple"), "flex_attention")
    assert graphs() > 8


def test_attention_that_is_not_causal() -> None:
    for name in ("kerple", "t5 both ways"):
        given = example(100)
        given.visible, given.causal = torch.ones_like(given.visible), False
        check(name, given)


def test_a_mask_for_each_head() -> None:
    given = example(LENGTH)
    generator = torch.Generator().manual_seed(0)
    given.visible = (
        given.visible & (torch.rand(2, 4, LENGTH, LENGTH, generator=generator) < 0.6) | torch.eye(LENGTH).bool()
    )
    check("kerple", given.with_mask())


def test_bfloat16_is_off_by_its_rounding() -> None:
    check("kerple", example(600, batch=1).to(torch.bfloat16), 0.02)


def test_heads_that_are_no_power_of_two() -> None:
    given = example(LENGTH, heads=(6, 2))
    weights = random_weights("kerple", heads=6)
    with torch.no_grad():
        assert (
            difference(attend("kerple", given, weights, "flex_attention"), reference("kerple", given, weights)) < 1e-5
        )


def test_one_query_takes_a_row_and_no_kernel(taken: list[str]) -> None:
    check("kerple", example(1, 300))
    assert taken == ["row"]


# Models


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_models_patched_for_it_and_moved_to_it(model_type: str) -> None:
    other = Pair(model_type, "kerple").model()
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :9] = 0
    expected = other(ids, use_cache=False).logits
    padded = other(ids, attention_mask=mask).logits[mask.bool()]
    patched = trained(hfpos.patch(Pair(model_type, "kerple").unpatched(), "kerple", backend="flex"))
    moved = Pair(model_type, "kerple").model()
    if model_type == "llama":
        moved.set_attn_implementation("flex_attention")
    else:  # of which Transformers says that they do not support it
        moved.config._attn_implementation = "flex_attention"
    for model in (patched, moved):
        assert difference(model(ids, use_cache=False).logits, expected) < 5e-5
        assert model.config._attn_implementation == "hfpos_flex"
        assert difference(model(ids, attention_mask=mask).logits[mask.bool()], padded) < 5e-5
        assert "flex_attention" in hfpos.describe(model).path


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "bloom"])
@torch.no_grad()
def test_steps_give_the_logits_of_one_forward(model_type: str) -> None:
    """In gemma3 a layer with a window comes first, whose keys reach less far back than those of the next."""
    model = trained(hfpos.patch(unpatched(model_type), "kerple", backend="flex"))
    ids = tokens(2, LENGTH)
    expected = Pair(model_type, "kerple").model()(ids, use_cache=False).logits
    cache, logits, start = None, [], 0
    for step in (25, 1, 1, LENGTH - 27):
        output = model(ids[:, start : start + step], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + step
        logits.append(output.logits)
    assert difference(torch.cat(logits, dim=1), expected) < 5e-5


@torch.no_grad()
def test_a_soft_cap_comes_before_the_bias() -> None:
    eager, flex = (
        hfpos.patch(unpatched("gemma2", attn_logit_softcapping=2.0), "alibi", backend=backend)
        for backend in ("eager", "flex")
    )
    ids = tokens(1, 9)
    expected = eager(ids, use_cache=False).logits
    assert difference(flex(ids, use_cache=False).logits, expected) < 5e-5
    output = flex(ids[:, :8])
    step = flex(ids[:, 8:], past_key_values=output.past_key_values)
    assert difference(step.logits, expected[:, 8:]) < 5e-5


# What it refuses


@pytest.mark.parametrize("scheme", ["alibi", "kerple"])
def test_training_on_a_cpu_is_refused(scheme: str) -> None:
    model = hfpos.patch(unpatched("llama"), scheme, backend="flex", prove=False)
    with pytest.raises(
        hfpos.PatchError, match=f"'{scheme}': flex_attention has no backward pass on the CPU.*backend='sdpa'"
    ):
        model(tokens(1, LENGTH))
    frozen = model.requires_grad_(False)
    assert frozen(tokens(1, LENGTH)).logits.isfinite().all()


def test_dropout_is_refused() -> None:
    model = hfpos.patch(unpatched("llama", attention_dropout=0.1), "kerple", backend="flex", prove=False).train()
    with (
        torch.no_grad(),
        pytest.raises(hfpos.PatchError, match="flex_attention has no attention dropout; set it to 0"),
    ):
        model(tokens(1, LENGTH))


@pytest.mark.parametrize("scheme", ["fire", "shaw"])
def test_a_bias_of_more_than_the_distance_is_refused(scheme: str) -> None:
    assert {SCHEMES[name][0] for name in RELATIVE} == {"alibi", "sandwich", "kerple", "t5"}
    with pytest.raises(hfpos.PatchError, match="'flex' cannot carry this scheme: .*Available: auto, eager, sdpa"):
        hfpos.patch(unpatched("llama"), scheme, backend="flex")
    model = Pair("llama", scheme).model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(hfpos.PatchError, match="'flex_attention' cannot carry this scheme"):
        model(tokens(1, LENGTH))
