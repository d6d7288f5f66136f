"""The short-context gate, with numbers worked out by hand."""

import math

import pytest

from hfpos import PatchError
from hfpos.report.gate import regressions, trades
from tests.report.examples import NONE, NTK, YARN, comparison, run, scores


def test_cost_and_gain():
    ntk, yarn = trades(comparison(run("none", NONE), run("ntk", NTK), run("yarn", YARN)))
    assert yarn.cost == pytest.approx(22.3 / 20.1 - 1)  # worse at 128 than at 64
    assert yarn.short.length == 128
    assert yarn.gain == pytest.approx(1 - 21.0 / 37.7)
    assert yarn.long.length == 512
    assert ntk.label == "ntk"
    assert str(yarn) == "yarn: 20.1 -> 22.3 (+10.9 %) at 128 tokens, 37.7 -> 21.0 (-44.3 %) at 512"


def test_the_worst_short_length_counts():
    found = trades(comparison(run("none", NONE), run("ntk", (25.0, 20.1, 1.0, 1.0))))[0]
    assert (found.short.length, found.cost) == (64, pytest.approx(25 / 21.3 - 1))


def test_regressions_are_above_what_is_allowed():
    given = comparison(
        run("none", (20.0, 20.0, 30.0, 40.0)), run("ntk", (20.0, 20.5, 1.0, 1.0)), run("yarn", (19.0, 19.5, 1.0, 1.0))
    )
    assert [trade.label for trade in regressions(given, 0.01)] == ["ntk"]
    assert regressions(given, 0.03) == ()
    assert trades(given)[1].cost == pytest.approx(-0.025)
    with pytest.raises(PatchError, match="allowed=nan: expected a share"):
        regressions(given, math.nan)


def test_overflow_is_a_regression():
    given = comparison(
        run("none", NONE), run("alibi", (math.inf, 1e5, 1e5, 1e5)), run("broken", (math.nan, 20.0, 1.0, 1.0))
    )
    assert [trade.label for trade in regressions(given, 1e6)] == ["alibi", "broken"]
    same = comparison(run("none", (math.inf,) * 4), run("nope", (math.inf,) * 4))
    assert trades(same)[0].cost == 0


def test_only_the_reference():
    assert trades(comparison(run("none", NONE))) == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (comparison(run("none", NONE), trained=None), "base does not state its trained length.*original_length"),
        (comparison(run("none", NONE), trained=32), "no length up to the trained 32 tokens.*add 32 to the lengths"),
        (comparison(run("none", None), run("yarn", YARN)), "no perplexity of none was measured"),
        (
            comparison(run("none", NONE), run("yarn", scores((9.0,), lengths=(512,)))),
            "yarn and none have no length up to",
        ),
    ],
)
def test_no_cost_to_be_told(given, message):
    with pytest.raises(PatchError, match=message):
        trades(given)
