"""ReRoPE, dual chunk, LM-Infinite, StreamingLLM, Self-Extend and xPos against their definitions, called without a model."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hfpos
from hfpos.attention import decayed, remapped, tiles
from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, PatchError
from tests.pairs import difference, tokens, unpatched
from tests.schemes.remapping import ORIGINAL, SCHEMES, attention, build, seen_at, tensors


REMAPPINGS = [name for name in SCHEMES if name != "xpos"]
MODEL = Geometry(heads=4, head_dim=16, rotary_dim=16, theta=10_000.0, trained_length=ORIGINAL, allowed_length=ORIGINAL)


@pytest.fixture(params=[7, 24], ids=["short blocks", "blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BLOCK", request.param)
    monkeypatch.setattr(tiles, "WORTHWHILE", 4)
    monkeypatch.setattr(decayed, "BLOCK", request.param)


@pytest.fixture(params=["merged", "one call"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "one call":  # as where the kernel that is merged does not fit: on a GPU
        monkeypatch.setattr(remapped, "can_merge", lambda *arguments: False)


def compare(name: str, inputs: list[torch.Tensor], tolerance: float, **options: Any) -> None:
    """Output and gradients of the scheme against its definition."""
    given = {key: value for key, value in options.items() if key != "interleaved"}
    convention = "interleaved" if options.get("interleaved") else "half"
    found = build(name)(*inputs, **given, convention=convention)
    assert found.dtype == inputs[0].dtype
    expected = attention(name, *inputs, **options)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((found * direction).sum(), inputs)
    exact = torch.autograd.grad((expected * direction).sum(), inputs)
    assert difference(found.double(), expected) < tolerance
    for one, other in zip(gradients, exact, strict=True):
        assert difference(one, other) < 10 * tolerance * max(other.abs().max().item(), 1)


@pytest.mark.usefixtures("block", "way")
@pytest.mark.parametrize("name", SCHEMES)
def test_output_and_gradients_are_those_of_the_definition(name: str) -> None:
    compare(name, tensors(2, 1, 61, 16), 3e-6)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 60), (7, 60), (2, 3), (1, 1)])
def test_the_last_queries_of_a_text(name: str, queries: int, keys: int) -> None:
    compare(name, tensors(1, 2, keys, 16, queries=queries), 3e-6)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05), (torch.float16, 0.006)], ids=str
)
def test_dtypes(name: str, dtype: torch.dtype, bound: float) -> None:
    inputs = [x.detach() for x in tensors(1, 2, 300, 16, dtype=dtype)]
    output = build(name)(*inputs)
    assert output.dtype == dtype
    assert difference(output.double(), attention(name, *inputs)) < bound


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", SCHEMES)
def test_part_of_a_head_interleaved_and_positions_with_a_gap(name: str) -> None:
    gap = torch.cat((torch.arange(20), torch.arange(45, 75)))
    compare(name, tensors(1, 1, 50, 24), 3e-6, positions=gap, rotary_dim=16, interleaved=True)


@pytest.mark.parametrize("name", SCHEMES)
@torch.no_grad()
def test_far_positions_keep_their_angles(name: str) -> None:
    positions = torch.cat((torch.arange(4), torch.arange(100_000, 100_056)))
    compare_only = build(name)(*tensors(1, 1, 60, 16), positions=positions)
    assert difference(compare_only.double(), attention(name, *tensors(1, 1, 60, 16), positions=positions)) < 3e-6


@pytest.mark.parametrize("name", REMAPPINGS)
def test_distances_are_those_of_the_definition(name: str) -> None:
    positions = torch.arange(80)[None]
    distance, seen = build(name).distances(MODEL, positions, positions)
    expected, shown = seen_at(name, positions[0][:, None], positions[0])
    causal = torch.ones(80, 80, dtype=torch.bool).tril()
    assert (seen[0] & causal).equal(shown & causal)
    torch.testing.assert_close(distance[0][shown & causal], expected[shown & causal], rtol=1e-15, atol=0)
    reach = {"self_extend": 27, "leaky": 28}.get(name, ORIGINAL)
    assert distance[0][shown & causal].max() <= reach


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest tensor has, and how many pairs of queries and keys the kernel was given."""

    elements, scored = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        output = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.scored += args[0].shape[2] * args[1].shape[2]
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("name", SCHEMES)
def test_memory_grows_with_the_length_and_hidden_keys_cost_nothing(name: str) -> None:
    length = 1024
    inputs = tensors(1, 1, length, 8)
    with Largest() as largest:
        build(name)(*inputs).sum().backward()
    rows = decayed.BLOCK if name == "xpos" else tiles.BLOCK
    assert largest.elements <= rows * (length + 2 * rows)
    forward_pairs = length * (length + 1) / 2
    if name in ("lm_infinite", "streaming_llm"):
        assert largest.scored < length * 4 * tiles.BLOCK
    elif name != "xpos":  # whose blocks are computed again in the backward pass
        assert largest.scored < forward_pairs + 3 * tiles.BLOCK * length


@torch.no_grad()
def test_xpos_in_half_precision_at_64k() -> None:
    keys = 65_536
    q, k, v = (x.detach() for x in tensors(1, 1, keys, 16, queries=3, dtype=torch.float16))
    scheme = hfpos.schemes.XPos()
    for rows in (1, 3):
        output = scheme(q[:, :, -rows:], k, v)
        assert output.isfinite().all()
        i, j = torch.arange(keys - rows, keys)[:, None], torch.arange(keys)
        distance = (i - j).clamp(min=0).double()
        zeta = torch.tensor([(2 * p / 16 + 0.4) / 1.4 for p in range(8)], dtype=torch.float64)
        logits = torch.zeros(2, rows, keys, dtype=torch.float64)
        for p, frequency in enumerate(inverse_frequencies(1e4, 16).tolist()):
            pair = [torch.complex(x[0, :, :, p].double(), x[0, :, :, p + 8].double()) for x in (q[:, :, -rows:], k)]
            turn = torch.polar(zeta[p] ** (distance / 512), distance * frequency)
            logits += (pair[0][:, :, None] * pair[1].conj()[:, None] * turn).real / 4
        expected = logits.masked_fill(j > i, float("-inf")).softmax(-1) @ v[0].double()
        assert difference(output[0].double(), expected) < 2e-3


def test_defaults_are_those_of_the_authors() -> None:
    model = Geometry(heads=1, head_dim=8, rotary_dim=8, theta=1e4, trained_length=4096, allowed_length=4096)
    schemes = hfpos.schemes
    assert schemes.ReRope().resolved_window(model) == 512
    chunks = schemes.DualChunk()
    assert (chunks.resolved_chunk(model), chunks.resolved_local(model)) == (3072, 1024)
    assert schemes.DualChunk(local=256).resolved_chunk(model) == 3840
    assert (schemes.LMInfinite().resolved_window(model), schemes.LMInfinite().sinks) == (4096, 10)
    assert (schemes.StreamingLLM().resolved_window(model), schemes.StreamingLLM().sinks) == (4092, 4)
    for scheme in (schemes.ReRope(), chunks, schemes.LMInfinite(), schemes.StreamingLLM(), schemes.XPos()):
        scheme.check(model)
        assert scheme.patched_length(model) == 4096
    assert schemes.ReRope(factor=16).patched_length(model) == 512 + 16 * (4096 - 512)
    assert schemes.DualChunk(factor=8).patched_length(model) == schemes.LMInfinite(
        target_length=32_768
    ).patched_length(model)
    assert schemes.ReRope(factor="inf") == schemes.ReRope()
    assert schemes.ReRope().factor == math.inf


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("rerope", {"window": 0}, "window=0 is not usable; expected a whole number of tokens"),
        ("rerope", {"window": 33}, "window=33 is longer than the original length of 32 tokens"),
        ("rerope", {"factor": 0.5}, "factor=0.5 is not usable; expected a finite number >= 1"),
        ("rerope", {"factor": math.nan}, "factor=nan is not usable"),
        ("rerope", {"factor": 1, "log_scaling": False}, "changes nothing"),
        ("rerope", {"factor": 2, "window": 8, "target_length": 100}, "reaches 56 tokens, not the target of 100"),
        ("rerope", {"log_scaling": 1}, "log_scaling=1 is not usable; expected True or False"),
        (
            "dual_chunk",
            {"chunk_size": 30, "local": 5},
            "chunk_size=30, local=5 does not fit the original length of 32",
        ),
        ("dual_chunk", {"chunk_size": 32}, "chunk_size=32 does not fit the original length of 32 tokens"),
        ("dual_chunk", {"chunk_size": 8, "local": 9}, "local=9 is longer than a chunk of 8 tokens"),
        ("dual_chunk", {"chunk_size": 2.5}, "chunk_size=2.5 is not usable"),
        ("dual_chunk", {"factor": 2, "target_length": 64}, "both factor=2 and target_length=64"),
        ("lm_infinite", {"window": 33}, "a window of 33 tokens .* expected a window of 1 to 32"),
        ("lm_infinite", {"sinks": 0}, "sinks=0 is not usable"),
        ("streaming_llm", {"window": 29}, "beside 4 sinks does not fit the original length of 32 .* of 1 to 28"),
        ("streaming_llm", {"sinks": 32}, "expected a window of 1 to 0"),
        ("lm_infinite", {"original_length": 64}, "conflicts with max_position_embeddings=32"),
        ("xpos", {"scale_base": 0}, "scale_base=0 is not usable; expected a finite number > 0"),
        ("xpos", {"base": 9}, "has no parameter 'base'"),
    ],
)
def test_parameters_that_cannot_be(name: str, parameters: dict, message: str) -> None:
    model = unpatched("llama")
    with pytest.raises(PatchError, match=message):
        hfpos.patch(model, name, **parameters)
    assert torch.equal(model(tokens(1, 9)).logits, unpatched("llama")(tokens(1, 9)).logits)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 2, 4), (1, 2, 4), (1, 2, 4)), {}, r"shapes \(1, 2, 4\), .* expected query \(batch, heads"),
        (((1, 3, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)), {}, "the heads a multiple of the key heads"),
        (((1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 6, 4)), {}, "have shapes"),
        (((1, 2, 6, 4), (1, 2, 5, 4), (1, 2, 5, 4)), {}, "6 queries were given for 5 keys"),
        (((1, 2, 5, 4),) * 3, {"positions": torch.arange(6)}, r"positions have shape \(6,\); expected \(5,\)"),
        (((2, 2, 5, 4),) * 3, {"positions": torch.zeros(3, 5).long()}, "the rows of the batch do not match"),
        (((1, 2, 5, 4),) * 3, {"positions": torch.arange(5.0)}, "expected whole numbers"),
        (((1, 2, 5, 4),) * 3, {"rotary_dim": 6}, "6 dimensions of a head that has 4 cannot be rotated"),
    ],
)
def test_tensors_that_do_not_fit(shapes: tuple, options: dict, message: str) -> None:
    for name in ("rerope", "xpos"):
        with pytest.raises(PatchError, match=f"{name}: .*{message}"):
            build(name)(*(torch.zeros(shape) for shape in shapes), **options)
    with pytest.raises(PatchError, match=r"one floating dtype"):
        build("xpos")(torch.zeros(1, 1, 2, 4), *torch.zeros(2, 1, 1, 2, 4).half())
    with pytest.raises(PatchError, match="rerope: there is no model here to read a trained length from"):
        hfpos.schemes.ReRope(window=2)(*torch.zeros(3, 1, 1, 2, 4))
