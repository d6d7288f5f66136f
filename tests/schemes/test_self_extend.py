"""Self-Extend: against its definition, pair by pair in float64; within its window the stock model; and what it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hfpos
from hfpos.attention import remapped, tiles
from hfpos.call import Call
from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, PatchError
from tests.pairs import ORIGINAL, ROTARY, difference, tokens, unpatched, use_backend
from tests.reference import llama_logits


WINDOW, GROUP = 9, 4  # which does not divide the window
QUERIES, KEYS = 37, 50
MODEL = Geometry(heads=4, head_dim=16, rotary_dim=16, theta=10_000.0, trained_length=4096, allowed_length=4096)
PARAMETERS = {"group_size": GROUP, "window": WINDOW}


def create(**parameters: Any) -> hfpos.schemes.SelfExtend:
    """The scheme by its registered name."""
    return hfpos.schemes()["self_extend"].create(**parameters)


def pairwise_scores(
    q: torch.Tensor, k: torch.Tensor, q_positions: torch.Tensor, k_positions: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """The definition: unscaled logits (..., Q, K) in float64; every pair turns by its distance, the grouped one where it is far."""
    far = (q_positions // GROUP + WINDOW - WINDOW // GROUP)[:, None] - k_positions // GROUP
    plain = q_positions[:, None] - k_positions
    distance = torch.where(plain < WINDOW, plain, far).double()
    angles = distance[..., None] * inverse_frequencies(10_000.0, 16)
    q, k = (as_complex(x[..., :16].double(), interleaved) for x in (q, k)), (q[..., 16:], k[..., 16:])
    (q, k), (q_rest, k_rest) = q, k
    turned = torch.einsum("...qr,...kr,qkr->...qk", q, k.conj(), torch.polar(torch.ones_like(angles), angles)).real
    return turned + q_rest.double() @ k_rest.double().transpose(-1, -2)


def as_complex(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The pairs of dimensions (..., 16) as 8 complex numbers."""
    return torch.complex(x[..., 0::2], x[..., 1::2]) if interleaved else torch.complex(x[..., :8], x[..., 8:])


def example(start: int, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Two rows of queries from position `start` on, the second five positions behind (left padded), and the keys up to them."""
    generator = torch.Generator().manual_seed(start)
    q, k, v = (
        torch.randn(2, *shape, head_dim, generator=generator).to(dtype)
        for shape in ((4, QUERIES), (2, KEYS), (2, KEYS))
    )
    ends = start + QUERIES
    k_positions = torch.stack((torch.arange(ends - KEYS, ends), torch.arange(ends - KEYS - 5, ends - 5))).clamp(min=0)
    return q, k, v, k_positions[:, -QUERIES:], k_positions


def visible(start: int) -> torch.Tensor:
    """(2, 1, Q, K): up to each query, from where the row begins."""
    causal = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)
    begins = torch.tensor([max(KEYS - QUERIES - start, 0), max(KEYS - QUERIES - start + 5, 0)])
    return causal & (torch.arange(KEYS) >= begins[:, None, None, None])


def expected(arguments: tuple[torch.Tensor, ...], mask: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """The float64 output (2, Q, H, D)."""
    q, k, v, q_positions, k_positions = arguments
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    rows = [pairwise_scores(q[i], k[i], q_positions[i], k_positions[i], interleaved) for i in range(2)]
    logits = torch.stack(rows) * q.shape[-1] ** -0.5
    return (logits.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num() @ v.double()).transpose(1, 2)


def attend(
    arguments: tuple[torch.Tensor, ...],
    mask: torch.Tensor | None,
    backend: str = "sdpa",
    convention: str = "half",
    **more: Any,
) -> torch.Tensor:
    """The same by `RemappedRotation`."""
    q, k, v, q_positions, k_positions = arguments
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.config = 2, True, SimpleNamespace()
    seam = remapped.RemappedRotation(create(**PARAMETERS), MODEL, convention)
    call = Call(seam, q_positions, k_positions, k.shape[2])
    return seam.attend(module, q, k, v, mask, call=call, backend=backend, **more)[0]


def additive(mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What Transformers hands to eager attention."""
    return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)


MASKS = {"sdpa": lambda mask: mask, "added": additive, "eager": additive}


def backend_of(kind: str) -> str:
    """The attention function behind a kind of mask."""
    return "eager" if kind == "eager" else "sdpa"


@pytest.fixture(params=[7, 256], ids=["blocks", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BLOCK", request.param)


@pytest.fixture
def one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the kernel that is merged does not fit: on a GPU."""
    monkeypatch.setattr(remapped, "can_merge", lambda *arguments: False)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("start", [0, 5, 30, 500])
@pytest.mark.parametrize("kind", MASKS)
def test_every_pair_turns_by_its_distance(kind: str, start: int) -> None:
    arguments, mask = example(start), visible(start)
    seen = mask.any(-1).transpose(1, 2)[..., None]  # what padding is given is nobody's business
    found = attend(arguments, MASKS[kind](mask), backend_of(kind)).double()
    assert found.isfinite().all()
    assert difference(found * seen, expected(arguments, mask) * seen) < 1e-5


@pytest.mark.usefixtures("one_call", "block")
def test_the_kernel_in_one_call_gives_the_same() -> None:
    arguments, mask = example(30), visible(30)
    assert difference(attend(arguments, mask).double(), expected(arguments, mask)) < 1e-5


def gradients(output: torch.Tensor, inputs: list[torch.Tensor], mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a weighted sum of the outputs of the queries that see something."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((output * direction * mask.any(-1).transpose(1, 2)[..., None]).sum(), inputs)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("start", [3, 30])
@pytest.mark.parametrize("kind", [*MASKS, "one call"])
def test_gradients(kind: str, start: int, request: pytest.FixtureRequest) -> None:
    if kind == "one call":
        request.getfixturevalue("one_call")
        kind = "sdpa"
    inputs, mask = [x.requires_grad_() for x in example(start)[:3]], visible(start)
    arguments = (*inputs, *example(start)[3:])
    reference = gradients(expected(arguments, mask), inputs, mask)
    for own, right in zip(
        gradients(attend(arguments, MASKS[kind](mask), backend_of(kind)), inputs, mask), reference, strict=True
    ):
        assert difference(own, right) < 1e-4


def test_a_query_that_sees_nothing_gives_finite_numbers_and_no_gradient() -> None:
    inputs, mask = [x.requires_grad_() for x in example(0)[:3]], visible(0)
    blind = ~mask.any(-1).transpose(1, 2)[..., None]
    assert blind.any()
    output = attend((*inputs, *example(0)[3:]), mask)
    assert output.isfinite().all()
    for gradient in torch.autograd.grad((output * blind).sum(), inputs):
        assert not gradient.any()


@pytest.mark.parametrize("convention", ["half", "interleaved"])
def test_part_of_a_head_in_either_convention(convention: str) -> None:
    arguments, mask = example(60, head_dim=24), visible(60)
    reference = expected(arguments, mask, convention == "interleaved")
    for kind in ("sdpa", "eager"):
        output = attend(arguments, MASKS[kind](mask), backend_of(kind), convention).double()
        assert difference(output, reference) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.004), (torch.float64, 2e-4)])
@pytest.mark.parametrize("kind", ["sdpa", "one call"])
def test_no_dtype_rounds_an_angle(kind: str, dtype: torch.dtype, bound: float, request: pytest.FixtureRequest) -> None:
    if kind == "one call":
        request.getfixturevalue("one_call")
    arguments, mask = example(3000, dtype=dtype), visible(3000)
    output = attend(arguments, mask)
    assert output.dtype == dtype
    assert difference(output.double(), expected(arguments, mask)) < bound


def test_without_a_mask_the_model_says_what_is_seen() -> None:
    q, k, v, q_positions, k_positions = example(30)
    last = slice(-QUERIES, None)
    arguments = (q, k[:, :, last], v[:, :, last], q_positions, k_positions[:, last])
    causal = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril()[None, None]
    assert difference(attend(arguments, None).double(), expected(arguments, causal)) < 1e-5
    everything = attend(arguments, None, is_causal=False).double()
    assert difference(everything, expected(arguments, torch.ones_like(causal))) < 1e-5


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that anything gives back."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("kind", ["sdpa", "one call"])
def test_nothing_is_as_large_as_all_queries_by_all_keys(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "one call":
        request.getfixturevalue("one_call")
    length = 2048
    q, k, v = (torch.randn(1, heads, length, 8, requires_grad=True) for heads in (2, 1, 1))
    positions = torch.arange(length)[None]
    seam = remapped.RemappedRotation(create(**PARAMETERS), MODEL, "half", None, inverse_frequencies(10_000.0, 8))
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 2, True
    call = Call(seam, positions, positions, length)
    with Largest() as largest:
        output, _ = seam.attend(module, q, k, v, None, call=call, backend="sdpa")
        output.sum().backward()
    assert q.grad.abs().max() > 0
    assert largest.elements <= tiles.BLOCK * (length + tiles.BLOCK + WINDOW)


@torch.no_grad()
def test_a_patched_llama_equals_its_definition() -> None:
    model = hfpos.patch(unpatched("llama"), "self_extend", **PARAMETERS)
    ids, positions = tokens(1, 120), torch.arange(120)
    reference = llama_logits(model, ids, lambda q, k: pairwise_scores(q, k, positions, positions) / 4)
    assert difference(model(ids).logits.double(), reference) < 5e-5
    use_backend(model, "eager")
    assert difference(model(ids).logits.double(), reference) < 5e-5


@pytest.mark.parametrize("model_type", [name for name in ROTARY if name != "mistral"])  # whose own window is shorter
@torch.no_grad()
def test_no_longer_than_the_window_is_the_stock_model_bit_for_bit(model_type: str) -> None:
    stock = unpatched(model_type)
    model = hfpos.patch(unpatched(model_type), "self_extend", factor=4, window=20)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    assert torch.equal(model(ids).logits, stock(ids).logits)
    assert torch.equal(model(ids, **padded).logits, stock(ids, **padded).logits)
    caches = [None, None]
    for now in (slice(0, 17), slice(17, 18), slice(18, 20)):
        outputs = [
            each(ids[:, now], past_key_values=cache) for each, cache in zip((model, stock), caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert difference(model(tokens(2, 60)).logits, stock(tokens(2, 60)).logits) > 1e-3


@pytest.mark.parametrize(
    ("model_type", "kind"), [("gemma2", "soft cap"), ("gpt_oss", "sinks"), ("cohere", "neighbours")]
)
@torch.no_grad()
def test_what_a_family_does_to_its_logits_is_kept(model_type: str, kind: str) -> None:
    """A single query goes through the family's own attention as it is, several go in blocks."""
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}} if kind == "sinks" else {}
    model = unpatched(model_type, **rope)
    model.set_attn_implementation("eager")
    stock, ids, cache, logits = model(tokens(1, 20)).logits, tokens(1, 45), None, []
    hfpos.patch(model, "self_extend", factor=4, window=20)
    assert torch.equal(model(tokens(1, 20)).logits, stock)
    for step in ids.split([30, 1, 1, 1, 1, 1, 10], dim=1):
        output = model(step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert difference(torch.cat(logits, 1), model(ids).logits) < 5e-5


@torch.no_grad()
def test_weights_of_a_model_that_shows_them() -> None:
    model = use_backend(hfpos.patch(unpatched("llama", num_hidden_layers=1), "self_extend", **PARAMETERS), "eager")
    ids, positions, found = tokens(1, 50), torch.arange(50), []

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        found.append(pairwise_scores(q, k, positions, positions) / 4)
        return found[-1]

    llama_logits(model, ids, scores)
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    weights = found[0].masked_fill(~causal, float("-inf")).softmax(-1)
    assert difference(model(ids, output_attentions=True).attentions[0].double(), weights) < 1e-5


def test_dropout_is_not_lost() -> None:
    model = hfpos.patch(unpatched("llama", attention_dropout=0.5), "self_extend", factor=4)
    ids = tokens(1, 60)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert difference(model.train()(ids).logits, model(ids).logits) > 1e-2


@torch.no_grad()
def test_a_scaled_model_is_extended_from_its_unscaled_frequencies() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL}
    scaled = unpatched("llama", max_position_embeddings=4 * ORIGINAL, rope_parameters=rope)
    plain = hfpos.patch(unpatched("llama"), "self_extend", factor=4)
    ids = tokens(1, 60)
    assert torch.equal(hfpos.patch(scaled, "self_extend", factor=4)(ids).logits, plain(ids).logits)


@pytest.mark.parametrize(
    ("parameters", "group", "length"),
    [
        ({"target_length": 16_384}, 5, 16_384),
        ({"target_length": 16_384, "window": 1024}, 5, 16_384),
        ({"target_length": 16_385}, 6, 16_385),
        ({"factor": 4}, 5, 16_384),
        ({"factor": 8, "window": 512}, 9, 32_768),
        ({"group_size": 8, "window": 1024}, 8, 25_600),
        ({"group_size": 8, "target_length": 20_000}, 8, 20_000),
        ({"factor": 2, "original_length": 4096, "window": 2048}, 3, 8192),
    ],
)
def test_the_smallest_group_that_reaches_the_target(parameters: dict, group: int, length: int) -> None:
    scheme = create(**parameters)
    scheme.check(MODEL)
    assert scheme.resolved_group(MODEL) == group
    assert scheme.patched_length(MODEL) == length
    window = scheme.resolved_window(MODEL)
    positions = torch.arange(length)
    q, k = scheme.far_positions(MODEL, positions)
    assert (q[-1] - k[0]).item() <= 4096
    assert (window + (length - window) / group) <= 4096
    if "group_size" not in parameters:
        assert window + (length - window) / (group - 1) > 4096
    assert torch.equal(q, positions // group + window - window // group)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "how far to extend is not given"),
        ({"group_size": 0}, "group_size=0 is not usable; expected a whole number"),
        ({"group_size": 2.5}, "group_size=2.5 is not usable"),
        ({"group_size": 1}, "group_size=1 changes nothing"),
        ({"group_size": 4, "window": 0}, "window=0 is not usable"),
        ({"group_size": 4, "window": True}, "window=True is not usable"),
        ({"group_size": 4, "window": ORIGINAL}, "window=32 leaves no distance for the groups"),
        ({"factor": 4, "target_length": 128}, "both factor=4 and target_length=128"),
        ({"factor": 0.5}, "expected a finite number >= 1"),
        ({"factor": 1}, "there is nothing to extend"),
        ({"target_length": 20}, "shorter than the original length 32"),
        (
            {"group_size": 2, "factor": 4},
            "reaches 56 tokens, not the target of 128; expected a group_size of at least 5",
        ),
        ({"factor": 4, "original_length": 64}, "conflicts with max_position_embeddings=32"),
        ({"factor": 4, "windo": 8}, "did you mean 'window'"),
    ],
)
def test_parameters_that_cannot_be(parameters: dict, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        hfpos.patch(unpatched("llama"), "self_extend", **parameters)


@pytest.mark.parametrize("name", ["position_bias", "cache"])
def test_what_does_not_fit_a_few_keys_is_refused(name: str) -> None:
    with pytest.raises(PatchError, match=f"hands '{name}' to attention, which 'self_extend' computes for a few keys"):
        attend(example(30), visible(30), **{name: torch.zeros(1, 4, QUERIES, KEYS)})
