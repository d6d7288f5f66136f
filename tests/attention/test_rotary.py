"""Frequencies that follow the length: against a float64 loop over the queries, in blocks, with gradients, in every dtype."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

import hfpos
from hfpos.attention import rotary
from hfpos.call import Call
from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry
from tests.pairs import ORIGINAL, difference, tokens, unpatched
from tests.reference import llama_logits, rotary_scores


Sets = Callable[[int], tuple[torch.Tensor, float]]
QUERIES, KEYS = 20, 50
SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [1.5 + 0.5 * i for i in range(8)]


def dynamic(length: int, dim: int = 16, theta: float = 10_000.0, factor: float = 4.0) -> tuple[torch.Tensor, float]:
    """Dynamic NTK as its note writes it: the base at `length`."""
    alpha = factor * length / ORIGINAL - (factor - 1) if length > ORIGINAL else 1.0
    return inverse_frequencies(theta * alpha ** (dim / (dim - 2)), dim), 1.0


def dynamic_yarn(length: int, dim: int = 16, theta: float = 10_000.0) -> tuple[torch.Tensor, float]:
    """YaRN at the scale of `length`: pairs that turn more than 32 times are kept, less than once are divided."""
    scale = max(1.0, length / ORIGINAL)
    bounds = [dim * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1)]
    low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), dim - 1)
    divided = ((torch.arange(dim // 2).double() - low) / (high - low)).clamp(0, 1)
    kept = inverse_frequencies(theta, dim)
    return kept * (1 - divided) + kept / scale * divided, 0.1 * math.log(scale) + 1


def longrope(length: int) -> tuple[torch.Tensor, float]:
    """LongRoPE: the short divisors up to the original length, the long ones beyond it."""
    divisors = torch.tensor(LONG if length > ORIGINAL else SHORT, dtype=torch.float64)
    return inverse_frequencies(10_000.0, 16) / divisors, 1.1


CASES: dict[str, tuple[dict, Sets]] = {
    "dynamic": ({"factor": 4.0}, dynamic),
    "dynamic_yarn": ({}, dynamic_yarn),
    "longrope": ({"short_factor": SHORT, "long_factor": LONG, "attention_factor": 1.1}, longrope),
}


def geometry(head_dim: int = 16) -> Geometry:
    """A model trained at `ORIGINAL` tokens that rotates 16 dimensions of each head."""
    return Geometry(
        heads=4, head_dim=head_dim, rotary_dim=16, theta=10_000.0, trained_length=ORIGINAL, allowed_length=ORIGINAL
    )


def example(start: int, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Two rows of queries from position `start` on, the second five positions behind (padded), and the keys before them."""
    generator = torch.Generator().manual_seed(start)
    shapes = ((4, QUERIES), (2, KEYS), (2, KEYS))
    q, k, v = (torch.randn(2, *shape, head_dim, generator=generator).to(dtype) for shape in shapes)
    ends = start + QUERIES
    k_positions = torch.stack((torch.arange(ends - KEYS, ends), torch.arange(ends - KEYS - 5, ends - 5))).clamp(min=0)
    return q, k, v, k_positions[:, -QUERIES:], k_positions


def visible() -> torch.Tensor:
    """Which key each query sees: those up to itself."""
    return torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)[None, None]


def expected(sets: Sets, arguments: tuple[torch.Tensor, ...], interleaved: bool = False) -> torch.Tensor:
    """The float64 output (B, Q, H, D), one query after the other."""
    q, k, v, q_positions, k_positions = arguments
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    rows = [
        rotary_scores(q[row].double(), k[row], q_positions[row], k_positions[row], sets, interleaved)
        for row in range(2)
    ]
    logits = torch.stack(rows).masked_fill(~visible(), float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2)


def attend(
    scheme: str,
    arguments: tuple[torch.Tensor, ...],
    backend: str = "sdpa",
    convention: str = "half",
    **parameters: object,
) -> torch.Tensor:
    """The same by `LengthAwareRotation`."""
    q, k, v, q_positions, k_positions = arguments
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.config = 2, True, SimpleNamespace()
    of_scheme = hfpos.schemes()[scheme](**(CASES[scheme][0] | parameters))
    seam = rotary.LengthAwareRotation(of_scheme, geometry(q.shape[-1]), convention)
    mask = visible() if backend == "sdpa" else torch.where(visible(), 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    mask = mask.expand(2, -1, -1, -1)
    call = Call(seam, q_positions, k_positions, KEYS)
    return seam.attend(module, q, k, v, mask, call=call, backend=backend)[0]


STARTS = [5, ORIGINAL - QUERIES, ORIGINAL - 9, ORIGINAL, 500]  # within, up to the boundary, across it, beyond


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("scheme", CASES)
def test_every_query_has_the_frequencies_of_its_own_length(scheme: str, backend: str, start: int) -> None:
    arguments = example(start)
    reference = expected(CASES[scheme][1], arguments)
    assert difference(attend(scheme, arguments, backend).double(), reference) < 1e-4
    if start >= ORIGINAL:
        assert difference(reference, expected(lambda length: CASES[scheme][1](1), arguments)) > 0.01


@pytest.mark.parametrize("scheme", CASES)
def test_blocks_of_queries_change_nothing(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = example(ORIGINAL - 9)
    whole = attend(scheme, arguments)
    monkeypatch.setattr(rotary, "BLOCK_ELEMENTS", 3 * arguments[1].numel())
    assert difference(attend(scheme, arguments), whole) < 1e-6


@pytest.mark.parametrize("convention", ["half", "interleaved"])
@pytest.mark.parametrize("scheme", CASES)
def test_part_of_a_head_in_either_convention(scheme: str, convention: str) -> None:
    for start in STARTS:
        arguments = example(start, head_dim=24)
        reference = expected(CASES[scheme][1], arguments, convention == "interleaved")
        assert difference(attend(scheme, arguments, convention=convention).double(), reference) < 1e-4


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("scheme", CASES)
def test_gradients(scheme: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [x.requires_grad_() for x in example(ORIGINAL - 9)[:3]]
    arguments = (*inputs, *example(ORIGINAL - 9)[3:])
    direction = torch.randn(2, QUERIES, 4, 16, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((expected(CASES[scheme][1], arguments) * direction).sum(), inputs)
    monkeypatch.setattr(rotary, "BLOCK_ELEMENTS", 3 * arguments[1].numel())
    own = torch.autograd.grad((attend(scheme, arguments, backend) * direction).sum(), inputs)
    for a, b in zip(own, gradients, strict=True):
        assert difference(a, b) < 1e-4


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@pytest.mark.parametrize("scheme", CASES)
def test_half_precision_rounds_no_angle(scheme: str, dtype: torch.dtype, bound: float) -> None:
    arguments = example(3000, dtype=dtype)
    output = attend(scheme, arguments)
    assert output.dtype == dtype
    assert difference(output.double(), expected(CASES[scheme][1], arguments)) < bound


@pytest.mark.parametrize("scheme", CASES)
@torch.no_grad()
def test_a_patched_llama_equals_the_float64_loop(scheme: str) -> None:
    parameters, sets = CASES[scheme]
    model = hfpos.patch(unpatched("llama"), scheme, **parameters)
    ids, positions = tokens(1, 60), torch.arange(60)
    reference = llama_logits(model, ids, lambda q, k: rotary_scores(q, k, positions, positions, sets))
    assert difference(model(ids).logits.double(), reference) < 5e-5


@torch.no_grad()
def test_a_patched_llama_with_skipped_ids_equals_the_float64_loop() -> None:
    model = hfpos.patch(unpatched("llama"), "dynamic", factor=4)
    ids, positions = tokens(1, 40), torch.cat((torch.arange(20), torch.arange(55, 75)))
    reference = llama_logits(model, ids, lambda q, k: rotary_scores(q, k, positions, positions, dynamic))
    for options in ({}, {"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
        assert difference(model(ids, position_ids=positions[None], **options).logits.double(), reference) < 5e-5


@torch.no_grad()
def test_packed_documents_equal_the_float64_loop() -> None:
    model = hfpos.patch(unpatched("llama"), "dynamic", factor=4)
    ids, positions = tokens(1, 60), torch.cat((torch.arange(19), torch.arange(41)))
    document = torch.arange(60) >= 19
    seen = torch.ones(60, 60, dtype=torch.bool).tril() & (document[:, None] == document)
    reference = llama_logits(model, ids, lambda q, k: rotary_scores(q, k, positions, positions, dynamic), seen)
    assert difference(model(ids, position_ids=positions[None]).logits.double(), reference) < 5e-5


@torch.no_grad()
def test_within_the_original_length_the_model_is_the_stock_one() -> None:
    ids = tokens(2, ORIGINAL)
    for model_type in ("llama", "mistral", "gemma3_text", "gpt_neox"):
        stock = unpatched(model_type)
        patched = hfpos.patch(unpatched(model_type), "dynamic", factor=4)
        assert difference(patched(ids).logits, stock(ids).logits) < 2e-5
        assert difference(patched(tokens(2, 50)).logits, stock(tokens(2, 50)).logits) > 1e-3


@pytest.mark.parametrize(("scheme", "static"), [("dynamic", None), ("dynamic_yarn", "yarn"), ("longrope", None)])
@torch.no_grad()
def test_pinned_to_a_target_is_static(scheme: str, static: str | None) -> None:
    parameters, sets = CASES[scheme]
    model = hfpos.patch(unpatched("llama"), scheme, **(parameters | {"factor": 4.0, "cache": "pinned"}))
    ids, positions = tokens(1, 60), torch.arange(60)
    fixed = sets(4 * ORIGINAL)
    reference = llama_logits(model, ids, lambda q, k: rotary_scores(q, k, positions, positions, lambda length: fixed))
    assert difference(model(ids).logits.double(), reference) < 5e-5
    if static is not None:
        assert torch.equal(model(ids).logits, hfpos.patch(unpatched("llama"), static, factor=4.0)(ids).logits)


@torch.no_grad()
def test_output_attentions_are_those_of_each_query() -> None:
    model = hfpos.patch(unpatched("llama", num_hidden_layers=1), "dynamic", factor=4)
    model.set_attn_implementation("eager")
    ids, positions, found = tokens(1, 50), torch.arange(50), []

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        found.append(rotary_scores(q, k, positions, positions, dynamic))
        return found[-1]

    llama_logits(model, ids, scores)
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    weights = found[0].masked_fill(~causal, float("-inf")).softmax(-1)
    assert difference(model(ids, output_attentions=True).attentions[0].double(), weights) < 1e-5
