"""Biases without a model: weights, queries and dtypes that are given, and those that do not fit."""

import math

import pytest
import torch

import hfpos
from hfpos.schemes import T5, Alibi, Fire, Kerple, Rotary, Sandwich, Shaw, XPos


P = torch.arange(5)
Q = torch.ones(2, 4, 5, 8)
ONE = {"slopes": torch.ones(3)}


def test_a_bias_in_the_dtype_that_is_asked_for() -> None:
    q, k = torch.tensor([100_000]), torch.tensor([0, 99_999, 7])
    slopes = [2.0 ** (-8 * h / 8) for h in range(1, 9)] + [2.0 ** (-8 * h / 16) for h in range(1, 8, 2)]
    expected = torch.tensor([[[-m * (100_000 - j) for j in k.tolist()]] for m in slopes], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-15), (torch.float32, 1e-7), (torch.bfloat16, 4e-3)):
        found = Alibi(12).bias(q, k, dtype=dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=0)
    r1, r2 = 1.7, 0.3
    exact = Kerple(1, r1=r1, r2=r2).bias(q, k, dtype=torch.float64)[0, 0].tolist()
    assert exact == pytest.approx([-r1 * math.log(1 + r2 * (100_000 - j)) for j in k.tolist()], rel=1e-14)
    single = Sandwich(3).bias(q, k)
    assert torch.equal(Sandwich(3).bias(q, k, dtype=torch.float16), single.half())
    weights = {"slopes": torch.tensor([0.5], dtype=torch.float64)}
    assert Alibi().bias(q, k, weights).dtype == torch.float64
    assert Alibi().bias(q, k, weights, dtype=torch.float32).dtype == torch.float32


REFUSED = [
    (lambda: Alibi(3).bias(P, P, {"slopes": torch.ones(4)}), "weights have the shapes slopes (4,); expected slopes (3,)"),
    (lambda: Alibi(3).bias(P, P, {}), "alibi: weights hold nothing; expected slopes"),
    (lambda: Alibi().bias(P, P, {"slope": torch.ones(3)}), "alibi: weights hold slope; expected slopes"),
    (lambda: Alibi(slopes_ahead=[1.0] * 3).bias(P, P, ONE), "weights hold slopes; expected slopes, slopes_ahead"),
    (lambda: Alibi(3).bias(P, P, [1.0]), "alibi: weights are a list; expected a dict of tensors, as from `weights`"),
    (lambda: Kerple(3).bias(P, P, {"raw_r1": [1.0] * 3, "raw_r2": torch.ones(3)}), "raw_r1 of the weights is a list"),
    (lambda: Alibi(3).bias(P, P, {"slopes": torch.ones(3).long()}), "slopes of the weights has the dtype torch.int64"),
    (lambda: Fire(4, hidden=8).bias(P, P, Fire(hidden=4).weights(Fire(4).alone())), "hidden_weight (4, 1)"),
    (lambda: T5(4).bias(P, P, {"table": torch.ones(4, 32)}), "table (4, 32); expected table (32, 4)"),
    (lambda: T5().bias(P, P, {"table": torch.ones(16, 4)}), "t5: weights have the shapes table (16, 4)"),
    (lambda: Shaw(max_distance=2).bias(P, P, {"table": torch.ones(7, 8)}, Q), "shaw: weights have the shapes table (7, 8)"),
    (lambda: Shaw(3, head_dim=8).bias(P, P, query=Q), "shaw: query has 4 heads, and it was made for num_heads=3"),
    (lambda: Shaw(4, head_dim=8).bias(P, P, query=Q.long()), "shaw: query has the dtype torch.int64; expected floats"),
    (lambda: Shaw(4, head_dim=8).bias(P, P, query=[1.0]), "shaw: query is a list; expected a tensor"),
    (lambda: Alibi(3).bias(P, P, dtype=torch.int32), "alibi: dtype=torch.int32 is not usable; expected a floating dtype"),
    (lambda: Rotary()(None, Q, P), "rope: q is a NoneType; expected a tensor"),
    (lambda: Rotary()(Q, Q, P, theta=0), "rope: theta=0 is not usable; expected a finite number > 1"),
    (lambda: Rotary()(Q, Q, P, theta=None), "rope: theta=None is not usable"),
    (lambda: Rotary()(Q, Q, P, rotary_dim=4.0), "rope: 4.0 dimensions of a head that has 8 cannot be rotated"),
    (lambda: XPos()(Q, Q, Q, theta="1"), "xpos: theta='1' is not usable"),
    (lambda: XPos()(Q, Q, Q, rotary_dim=4.0), "xpos: 4.0 dimensions of a head that has 8 cannot be rotated"),
    (lambda: XPos()(Q, None, Q), "xpos: key is a NoneType; expected a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:60] for _, message in REFUSED])
def test_what_does_not_fit_is_named(call, message: str) -> None:
    with pytest.raises(hfpos.PatchError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_for_as_many_heads_as_they_have() -> None:
    assert Alibi().bias(P, P, ONE).shape == (3, 5, 5)
    assert T5(num_buckets=6, max_distance=9).bias(P, P, {"table": torch.ones(6, 7)}).shape == (7, 5, 5)
    assert Shaw(max_distance=2).bias(P, P, {"table": torch.ones(5, 8)}, Q).shape == (2, 4, 5, 5)
    for heads in (1, 5):
        assert Fire().bias(P, P, Fire(heads).weights(Fire(heads).alone())).shape == (heads, 5, 5)
