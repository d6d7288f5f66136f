"""Schemes used without a model: biases, rotations and tables against formulas written out in float64, and what they refuse."""

import math

import pytest
import torch

import hfpos
from hfpos.schemes import T5, Alibi, Kerple, Learned, Linear, Partial, Rotary, Sandwich, Shaw, Sinusoidal, Yarn
from hfpos.schemes.alibi import alibi_slopes


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype)


# Biases


BIASES = [
    Alibi(6),
    Alibi(6, bidirectional=True),
    Kerple(6),
    Sandwich(6),
    hfpos.schemes.Fire(6),
    T5(6),
    Shaw(6, head_dim=4),
]
each_bias = pytest.mark.parametrize("scheme", BIASES, ids=str)


def queries(scheme: hfpos.scheme.Bias, *shape: int) -> dict[str, torch.Tensor]:
    return {"query": rows(*shape, dtype=torch.float32)} if scheme.reads_query else {}


@each_bias
def test_shapes_with_and_without_a_batch(scheme: hfpos.scheme.Bias) -> None:
    q, k = torch.tensor([3, 9]), torch.tensor([0, 3, 4, 9, 70_000])
    alone = scheme.bias(q, k, **queries(scheme, 6, 2, 4))
    assert alone.shape == (6, 2, 5)
    assert alone.dtype == torch.float32
    both = scheme.bias(torch.stack((q, q + 1)), k, **queries(scheme, 6, 2, 4))
    assert both.shape == (2, 6, 2, 5)
    torch.testing.assert_close(both[0], alone)
    assert torch.equal(
        scheme.bias(q.int(), k.short() if k.max() < 2**15 else k.int(), **queries(scheme, 6, 2, 4)), alone
    )
    geometry = hfpos.scheme.Geometry(6, 4, 4, theta=1e4, trained_length=None, allowed_length=None)
    exact = scheme.bias(q, k, scheme.weights(geometry), **queries(scheme, 6, 2, 4))
    torch.testing.assert_close(alone.double(), exact, rtol=1e-6, atol=1e-6)


def test_alibi_is_its_formula() -> None:
    found = Alibi(12).bias(torch.arange(7), torch.arange(7))
    for head, slope in enumerate(alibi_slopes(12)):
        for i in range(7):
            assert found[head, i].tolist() == pytest.approx([-slope * (i - j) for j in range(7)], rel=1e-6)


def test_alibi_with_two_slopes_and_with_heads_that_look_one_way() -> None:
    q, k = torch.arange(5), torch.arange(5)
    behind, ahead = [1.0, 0.5], [0.25, 0.0]
    found = Alibi(slopes=behind, slopes_ahead=ahead, factor=2).bias(q, k, num(behind, ahead, 2))
    split = Alibi(6, bidirectional="split").bias(q, k)
    slopes = alibi_slopes(3)
    for i in range(5):
        for j in range(5):
            one = [-(m if j < i else n) / 2 * abs(i - j) for m, n in zip(behind, ahead, strict=True)]
            assert found[:, i, j].tolist() == one
            back = [-m * (i - j) if j <= i else -math.inf for m in slopes]
            on = [-m * (j - i) if j >= i else -math.inf for m in slopes]
            assert split[:, i, j].tolist() == pytest.approx(back + on)
    assert Alibi(2, slopes_ahead=alibi_slopes(2)).bias(q, k).equal(Alibi(2, bidirectional=True).bias(q, k))


def num(behind: list[float], ahead: list[float], factor: float) -> dict[str, torch.Tensor]:
    scheme = Alibi(slopes=behind, slopes_ahead=ahead, factor=factor)
    geometry = hfpos.scheme.Geometry(len(behind), 4, 4, theta=1e4, trained_length=None, allowed_length=None)
    return scheme.weights(geometry)


@pytest.mark.parametrize("scheme", [scheme for scheme in BIASES if scheme.learned], ids=str)
def test_modules_learn_and_keep_their_precision(scheme: hfpos.scheme.Bias, tmp_path) -> None:
    module, (q, k) = scheme.module(), (torch.tensor([[0, 5]]), torch.tensor([[0, 3, 5]]))
    given = tuple(queries(scheme, 1, 6, 2, 4).values())
    assert torch.equal(module(q, k, *given), scheme.bias(q, k, None, *given))
    assert all("bias" in name for name, _ in module.named_parameters())
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    module.bfloat16()
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    (module(q, k, *given) - 1).pow(2).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert any(not torch.equal(weight, before[name]) for name, weight in module.named_parameters())
    again = scheme.module()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(q, k, *given), module(q, k, *given))


def test_a_scheme_made_for_some_heads_is_the_scheme() -> None:
    assert Alibi(8) == Alibi()
    assert Alibi(8).parameters() == Alibi().parameters() == {
        "slopes": None, "factor": 1.0, "bidirectional": False, "slopes_ahead": None,
    }  # fmt: skip
    assert Shaw(8, head_dim=4).parameters() == {"max_distance": 16}
    assert Sinusoidal(8).parameters() == {"layout": "interleaved", "scale": 1.0}
    assert Learned(8, target_length=3).parameters() == {"target_length": 3, "init": "copy"}


# Rotations


def turned(x: torch.Tensor, positions: torch.Tensor, inv_freq: list[float], scale: float, half: bool) -> torch.Tensor:
    """`x` (..., Q, D) with pairs of dimensions as complex numbers, turned."""
    r = len(inv_freq)
    first, second = (x[..., :r], x[..., r : 2 * r]) if half else (x[..., 0 : 2 * r : 2], x[..., 1 : 2 * r : 2])
    angles = positions.double()[..., :, None] * torch.tensor(inv_freq, dtype=torch.float64)
    z = torch.complex(first, second) * torch.polar(torch.full_like(angles, scale), angles)
    pairs = torch.cat((z.real, z.imag), -1) if half else torch.stack((z.real, z.imag), -1).flatten(-2)
    return torch.cat((pairs, x[..., 2 * r :]), -1)


def base(theta: float, width: int) -> list[float]:
    return [theta ** (-2 * i / width) for i in range(width // 2)]


ROTATIONS = [
    (Rotary(), {}, base(1e4, 16), 1.0),
    (Rotary(theta=500_000), {"rotary_dim": 4, "theta": 7.0}, base(5e5, 4), 1.0),
    (Rotary(), {"theta": 300, "rotary_dim": 10}, base(300, 10), 1.0),
    (Linear(factor=8, original_length=64), {}, [f / 8 for f in base(1e4, 16)], 1.0),
    (Partial(fraction=0.25), {}, base(1e4, 16)[:2] + [0.0] * 6, 1.0),
]


@pytest.mark.parametrize("convention", ["half", "interleaved"])
@pytest.mark.parametrize(("scheme", "options", "inv_freq", "scale"), ROTATIONS, ids=str)
def test_rotations_are_their_formula(scheme, options, inv_freq, scale, convention) -> None:
    q, k = rows(2, 4, 3, 16), rows(2, 1, 3, 16)
    options = options | {"convention": convention}
    for positions in (torch.tensor([0, 5, 131_071]), torch.tensor([[0, 1, 2], [7, 70_000, 3]])):
        spread = positions[:, None] if positions.ndim == 2 else positions
        expected = [turned(x, spread, inv_freq, scale, convention == "half") for x in (q, k)]
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)):
            found = scheme(q.to(dtype), k.to(dtype), positions, **options)
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == dtype
                torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
    three = scheme(q[0], k[0], torch.arange(3), **options)[0]  # no batch
    torch.testing.assert_close(three, turned(q[0], torch.arange(3), inv_freq, scale, convention == "half"))


def test_yarn_has_its_temperature_in_both() -> None:
    yarn = Yarn(factor=4, original_length=2048)
    q, k = yarn(rows(1, 2, 3, 64), rows(1, 2, 3, 64), torch.zeros(3).long())
    torch.testing.assert_close(q, rows(1, 2, 3, 64) * (0.1 * math.log(4) + 1))
    torch.testing.assert_close(k, q)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    for scheme in (Rotary(), Yarn(factor=4, original_length=2048)):
        found = []
        for start in (0, 12_345):
            q, k = scheme(rows(1, 2, 5, 64), rows(1, 1, 5, 64), torch.arange(5) + start)
            found.append(q @ k.mT)
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_gradients_flow_and_compiled_is_equal() -> None:
    q, k = rows(1, 2, 3, 8).requires_grad_(), rows(1, 1, 3, 8).requires_grad_()
    positions = torch.tensor([[0, 5, 9]])
    assert torch.autograd.gradcheck(lambda q, k: Yarn(factor=2, original_length=8)(q, k, positions), (q, k))
    compiled = torch.compile(
        lambda q, k: Rotary()(q, k, positions) + (Alibi(2).bias(positions, positions),),
        backend="aot_eager",
        fullgraph=True,
    )
    for found, expected in zip(
        compiled(q, k), (*Rotary()(q, k, positions), Alibi(2).bias(positions, positions)), strict=True
    ):
        torch.testing.assert_close(found, expected)


# Tables


@pytest.mark.parametrize("width", [1, 4, 7, 64])
@pytest.mark.parametrize("layout", ["interleaved", "halves", "fairseq"])
def test_sinusoids_are_their_formula(layout: str, width: int) -> None:
    if layout == "fairseq" and width < 4:
        with pytest.raises(hfpos.PatchError, match="does not go with a width of 1; expected at least 4"):
            Sinusoidal(width, layout=layout)(torch.arange(2))
        return
    positions = torch.tensor([[0, 1, 5], [70_000, 3, 131_071]])
    exact = Sinusoidal(width, layout=layout)(positions.double())
    assert exact.shape == (2, 3, width)
    for p, row in zip(positions.flatten().tolist(), exact.flatten(0, 1).tolist(), strict=True):
        if layout == "fairseq":
            w = [10_000 ** (-i / (width // 2 - 1)) for i in range(width // 2)]
            expected = [math.sin(p * f) for f in w] + [math.cos(p * f) for f in w] + [0.0] * (width % 2)
        else:
            w = [10_000 ** (-2 * i / width) for i in range((width + 1) // 2)]
            sines, cosines = [math.sin(p * f) for f in w], [math.cos(p * f) for f in w]
            in_turn = [x for pair in zip(sines, cosines, strict=True) for x in pair]
            expected = (in_turn if layout == "interleaved" else sines + cosines)[:width]
        assert row == pytest.approx(expected, rel=0, abs=1e-10 if p > 1000 else 1e-14)
    single = Sinusoidal(width, layout=layout)(positions)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-7)


def test_a_learned_table_of_ones_own() -> None:
    table = Learned(4, target_length=6).module()
    assert table(torch.tensor([[0, 5]])).tolist() == [[[0.0] * 4] * 2]
    table(torch.tensor([2, 2, 3])).sum().backward()
    assert table.weight.grad[:, 0].tolist() == [0, 0, 2, 1, 0, 0]
    for wrong in (6, -1):
        with pytest.raises(
            hfpos.PatchError, match=rf"position {wrong} is outside of the table of 6 positions, 0 \.\. 5"
        ):
            table(torch.tensor([0, wrong]))


# What they refuse


Q, K, P = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 3, 8), torch.arange(3)
DYNAMIC = hfpos.schemes.Dynamic(factor=2, original_length=8)
REFUSED = [
    (lambda: Alibi().bias(P, P), "alibi: how many heads there are is not known; pass it, Alibi(num_heads), or weights="),
    (lambda: Alibi(0).bias(P, P), "alibi: num_heads=0 is not usable; expected a whole number >= 1"),
    (lambda: Alibi(8.0).bias(P, P), "alibi: num_heads=8.0 is not usable"),
    (lambda: Alibi(2).bias(P[None, None], P), "q_positions has shape (1, 1, 3); expected (tokens,) or (batch, tokens)"),
    (lambda: Alibi(2).bias(P, torch.tensor(3)), "k_positions has shape (); expected (tokens,)"),
    (lambda: Alibi(2).bias(P.float(), P), "q_positions has the dtype torch.float32; expected whole numbers"),
    (lambda: Alibi(2).bias(P, [0, 1]), "k_positions is a list; expected a tensor of positions"),
    (lambda: Alibi(2).bias(P.expand(2, 3), P.expand(5, 3)), "rows of the batch do not match (q_positions 2, k_positions 5)"),
    (lambda: Alibi(2).bias(P, P, query=Q), "alibi: query= was given, and this bias does not depend on it"),
    (lambda: Alibi(2).module(), "alibi: nothing is learned here; call bias(q_positions, k_positions)"),
    (lambda: Alibi(3, slopes=[1.0]).bias(P, P), "alibi: 1 values of slopes were given, the model has 3 attention heads"),
    (lambda: Alibi(3, bidirectional="split").bias(P, P), "bidirectional='split' needs an even number of heads"),
    (lambda: Alibi(bidirectional="spilt"), "bidirectional='spilt' is unknown: did you mean 'split'?"),
    (lambda: Alibi(bidirectional=True, slopes_ahead=[1.0]), "both bidirectional=True and slopes_ahead were given"),
    (lambda: Alibi(slopes_ahead=[-1.0]), "slopes_ahead=-1.0 is not usable"),
    (lambda: Kerple().module(), "kerple: how many heads there are is not known; pass it, Kerple(num_heads), or weights="),
    (lambda: Shaw(4).module(), "shaw: how wide a head is is not known; pass it, Shaw(num_heads, head_dim=64)"),
    (lambda: Shaw(4).bias(P, P), "shaw: the bias depends on the queries; pass query= (batch, heads, 3 tokens, head_dim)"),
    (lambda: Shaw(4).bias(P, P, query=Q[:, :, :2]), "shaw: query has shape (2, 4, 2, 8); expected (heads, 3 tokens, head_dim)"),
    (lambda: Shaw(4, head_dim=16).bias(P, P, query=Q), "shaw: it was made for head_dim=16, heads here have 8 dimensions"),
    (lambda: Rotary()(Q, K, P[None, None]), "rope: positions has shape (1, 1, 3)"),
    (lambda: Rotary()(Q, K[:, :, :2], P), "rope: k has shape (2, 2, 2, 8) and dtype torch.float32, positions (3,); expected floats"),
    (lambda: Rotary()(Q[0], K[0], P[None]), "rope: q has shape (4, 3, 8) and dtype torch.float32, positions (1, 3)"),
    (lambda: Rotary()(Q.long(), K, P), "rope: q has shape (2, 4, 3, 8) and dtype torch.int64"),
    (lambda: Rotary()(Q, K[..., :6], P), "rope: heads of q have 8 dimensions, those of k 6; expected as many"),
    (lambda: Rotary()(Q, K, P.expand(3, 3)), "rope: the rows of the batch do not match (q 2, k 2, positions 3)"),
    (lambda: Rotary()(Q, K, P, rotary_dim=10), "rope: 10 dimensions of a head that has 8 cannot be rotated"),
    (lambda: Rotary()(Q[..., :7], K[..., :7], P), "rope: 7 dimensions of a head that has 7 cannot be rotated"),
    (lambda: Rotary()(Q, K, P, convention="neox"), "rotary convention 'neox' is unknown"),
    (lambda: Yarn(factor=4)(Q, K, P), "yarn: there is no model here to read a trained length from; pass original_length="),
    (lambda: Yarn(original_length=4)(Q, K, P), "yarn: how far to extend is not given"),
    (lambda: DYNAMIC(Q, K, P), "dynamic: its frequencies differ from query to query"),
    (lambda: Sinusoidal()(P), "sinusoidal: how wide the rows are is not known; pass it, Sinusoidal(dim)"),
    (lambda: Sinusoidal(0), "sinusoidal: dim=0 is not usable"),
    (lambda: Sinusoidal(4)(P > 1), "sinusoidal: positions has the dtype torch.bool; expected integers or floats"),
    (lambda: Sinusoidal(4, scale=0), "sinusoidal: scale=0 is not usable"),
    (lambda: Sinusoidal(4, layout="half"), "sinusoidal: layout='half' is unknown: did you mean 'halves'?"),
    (lambda: Learned(4).module(), "learned: how long the table is to be is not known; pass target_length="),
    (lambda: Learned(target_length=4).module(), "learned: how wide the rows are is not known; pass it, Learned(dim"),
    (lambda: Learned(4, target_length=4, init="tile").module(), "learned: init='tile' is for a model that has a table"),
    (lambda: Learned(4, target_length=4).module()(P.float()), "learned: positions have the dtype torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_what_does_not_fit_is_named(call, message: str) -> None:
    with pytest.raises(hfpos.PatchError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
