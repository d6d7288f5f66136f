"""`results.json`: what is written is what is read."""

import json
import math

import pytest

from hfpos import PatchError
from hfpos.report.results import Results, load, merge, save
from tests.report.examples import NONE, comparison, full, run, scores


def test_round_trip(tmp_path):
    results = Results((full(), comparison(run("none", NONE), stride="window")))
    save(results, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == results


def test_numbers_that_json_does_not_know(tmp_path):
    given = comparison(
        run(
            "none",
            scores((math.inf, math.nan, 1.0, 2.0), stderr=math.inf),
            wavelengths=(6.0, None),
            parameters={"factor": math.inf},
        )
    )
    save(Results((given,)), tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    found = load(tmp_path / "results.json").comparisons[0].runs[0]
    assert found.perplexity.by_length[64].perplexity == found.perplexity.by_length[64].stderr == math.inf
    assert math.isnan(found.perplexity.by_length[128].perplexity)
    assert found.parameters == {"factor": "Infinity"}


def test_unreadable(tmp_path):
    with pytest.raises(PatchError, match="No such file"):
        load(tmp_path / "nowhere.json")
    path = tmp_path / "other.json"
    path.write_text('{"comparisons": [], "schema": "something else"}', encoding="utf-8")
    with pytest.raises(PatchError, match=r"other.json is not a results.json of `hfpos compare`: schema"):
        load(path)


def test_merge_keeps_order_and_drops_repeats():
    one, two = comparison(run("none", NONE)), comparison(run("none", NONE), path="models/other")
    assert merge([Results((one,)), Results((two, one))]) == Results((one, two))


def test_what_a_comparison_can_tell():
    found = comparison(
        run("none", scores((9.0,), lengths=(64,))), run("key", None), run("yarn", NONE), path="hub/SmolLM/"
    )
    assert (found.name, found.lengths, list(found.scores)) == ("SmolLM", (64, 128, 256, 512), ["none", "yarn"])
