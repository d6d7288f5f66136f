"""A bias as extra dimensions of queries and keys: exact parts, what kernels take, every mask, and the error far out."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hfpos.attention.separable import WIDEST, features, fits, separable_attention, split
from hfpos.scheme import Geometry
from hfpos.schemes import Alibi, Fire, Kerple, Sandwich
from tests.attention.exact import (
    Example,
    attend,
    build,
    difference,
    example,
    geometry,
    module,
    reference,
    taken,
)
from tests.attention.test_blocks import CASES


__all__ = ["taken"]
NAMES = ("alibi", "sandwich")


def by_features(name: str, given: Example) -> torch.Tensor:
    """Attention (B, Q, H, D) by stock SDPA with the features of the scheme."""
    scheme = build(name)
    weights = {
        key: value.to(torch.promote_types(given.tensors[0].dtype, torch.float32))
        for key, value in scheme.weights(geometry()).items()
    }
    positions = given.q_positions, given.k_positions
    output, _ = separable_attention(
        scheme,
        weights,
        positions,
        sdpa_attention_forward,
        module(given.causal),
        *given.tensors,
        given.mask,
        scaling=0.25,
    )
    return output


@pytest.mark.parametrize("case", [*CASES, lambda: example(1025, batch=1), lambda: example(2), lambda: example(255)])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_for_every_mask(name: str, case) -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        given = case().to(dtype)
        inputs = given.tensors = [x.requires_grad_() for x in given.tensors]
        found, expected = by_features(name, given) * given.real(), reference(name, given, {})
        assert found.is_contiguous()
        assert difference(found, expected) < bound
        direction = torch.randn_like(expected)
        gradients = (torch.autograd.grad((x * direction).sum(), inputs) for x in (found, expected))
        for a, b in zip(*gradients, strict=True):
            assert difference(a, b) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_narrow_types_are_off_by_their_rounding(name: str, case, dtype: torch.dtype) -> None:
    given = case().to(dtype)
    error = (by_features(name, given).double() - reference(name, given, {})) * given.real()
    assert error.abs().max() < {torch.bfloat16: 0.02, torch.float16: 0.0025}[dtype]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_attention_that_is_not_causal(name: str) -> None:
    given = example(100)
    given.visible, given.causal = torch.ones_like(given.visible), False
    for case in (given, given.with_mask()):
        assert difference(by_features(name, case), reference(name, given, {})) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [512, 8192, 131_072])
@torch.no_grad()
def test_the_error_of_the_steepest_slope_is_what_is_stated(length: int, dtype: torch.dtype) -> None:
    """Queries and keys at both ends of `length` tokens, where positions counted from the middle are the largest."""
    ends = torch.cat((torch.arange(200), torch.arange(length - 200, length)))[None]
    given = example(400)
    given.q_positions = given.k_positions = ends
    given = given.with_mask().to(dtype)
    scheme = Alibi(slopes=[0.5] * 4)
    positions = ends, ends
    weights = {"slopes": torch.full((4,), 0.5)}
    output, _ = separable_attention(
        scheme, weights, positions, sdpa_attention_forward, module(), *given.tensors, given.mask, scaling=0.25
    )
    q, k, v = (x.double().repeat_interleave(4 // x.shape[1], dim=1) for x in given.tensors)
    logits = q @ k.mT / 4 - 0.5 * (ends[0][:, None] - ends[0]).double()
    expected = (logits.masked_fill(~given.visible, float("-inf")).softmax(-1) @ v).transpose(1, 2)
    stated = 0.5 * length / 2 * 2**-24
    rounding = {torch.float32: 1e-6, torch.bfloat16: 0.02, torch.float16: 0.0025}[dtype]
    assert (output.double() - expected).abs().max() < 4 * stated + rounding  # values are up to 4


@pytest.mark.parametrize(("dtype", "parts"), [(torch.bfloat16, 3), (torch.float16, 2)], ids=str)
def test_parts_sum_to_the_whole(dtype: torch.dtype, parts: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    pieces = split(values, dtype, parts)
    assert [piece.dtype for piece in pieces] == [dtype] * parts
    error = sum(piece.double() for piece in pieces) - values.double()
    assert error.abs().max() == 0 if dtype == torch.bfloat16 else error.abs().max() < 2e-6
    positions = torch.arange(-131_072, 131_072, 7).float() / 256
    assert torch.equal(sum(piece.double() for piece in split(positions, dtype, 3)), positions.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_their_product_is_the_bias(dtype: torch.dtype) -> None:
    """Also of slopes that are no power of two, which one part would round."""
    slopes = torch.tensor(Alibi().head_slopes(12))
    ends = torch.tensor([[0, 131_071]])
    keys = torch.arange(0, 131_072, 311)[None]
    f, g = features(Alibi(), {"slopes": slopes}, 0.125, (ends, keys), dtype)
    found = (f.double() @ g.double().mT)[0, :, 0] * 0.125
    exact = slopes.double()[:, None] * (keys - 65_535)
    assert ((found - exact).abs() <= 2**-16 * exact.abs()).all()


def test_features_are_as_few_as_can_be_and_stay_finite() -> None:
    positions = torch.tensor([[0, 16_000_000]]), torch.tensor([[0, 8_000_000, 16_000_000]])
    weights = {"slopes": torch.tensor([0.5, 2.0**-8])}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        f, g = features(Alibi(), weights, 0.125, positions, dtype)
        assert f.dtype == g.dtype == dtype
        assert f.shape == (1, 2, 1, 8)
        assert g.shape == (1, 1, 3, 8)
        assert f.isfinite().all()
        assert g.isfinite().all()
    assert features(Kerple(), Kerple().weights(geometry()), 1.0, positions, torch.float32) is None


def test_what_fits_into_the_width_that_kernels_take() -> None:
    weights = {"slopes": torch.ones(4)}
    for width, good in ((WIDEST - 8, True), (WIDEST - 7, False), (250, False), (WIDEST, False)):
        assert fits(Alibi(), width, torch.bfloat16, weights) is good
    compression = {"compression": torch.ones(4)}
    assert fits(Sandwich(), 128, torch.float32, compression)
    assert not fits(Sandwich(), 128, torch.bfloat16, compression)  # 128 in 2 x 3 parts
    one = Geometry(heads=4, head_dim=8, rotary_dim=8, theta=1.0, trained_length=None, allowed_length=None)
    for scheme in (Alibi(bidirectional=True), Kerple(), Fire()):
        assert not fits(scheme, 8, torch.float32, scheme.weights(one))


@torch.no_grad()
def test_wider_heads_go_without_the_features(taken: list[str]) -> None:
    given = example(40).with_mask()
    for width, way in ((248, "features"), (250, "written")):
        given.tensors = [torch.randn(*x.shape[:-1], width) for x in given.tensors]
        assert difference(attend("alibi", given, {}), reference("alibi", given, {})) < 1e-5
        assert taken.pop() == way
        taken.clear()


def test_values_of_another_width_than_keys() -> None:
    given = example(20)
    given.tensors[2] = given.tensors[2][..., :5].clone()
    assert by_features("alibi", given).shape == (2, 20, 4, 5)
    assert difference(by_features("alibi", given), reference("alibi", given, {})) < 1e-5


def test_a_bias_that_does_not_separate_is_refused() -> None:
    given, scheme = example(5), Kerple()
    with pytest.raises(TypeError, match="kerple does not separate"):
        separable_attention(
            scheme,
            scheme.weights(geometry()),
            (given.q_positions, given.k_positions),
            sdpa_attention_forward,
            module(),
            *given.tensors,
            None,
            scaling=0.25,
        )
