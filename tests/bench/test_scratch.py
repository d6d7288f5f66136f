"""The benchmark of schemes trained from scratch, at tiny sizes and in this process: what it trains, keeps, compares and prints."""

import json
import random

import pytest

import hfpos
from hfpos.bench import scratch
from hfpos.bench.run import BENCHMARKS
from hfpos.describe import describe
from hfpos.report.results import load
from hfpos.train.recipe import Recipe
from tests.command_line import run


CHANGES = (
    "model.config.hidden_size=16",
    "model.config.intermediate_size=16",
    "model.config.max_position_embeddings=16",
    "model.tokenizer=260",
    "data.length=16",
    "training.max_steps=2",
    "training.per_device_train_batch_size=2",
)


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPOS_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    for name in ("train", "held_out"):
        rows = ({"text": " ".join(draw.choices(["red", "green", "one", "two"], k=60))} for _ in range(8))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def commands(monkeypatch):
    """The commands that were given, each run in this process."""
    given = []

    def here(*arguments, threads):
        given.append(arguments[0])
        if given != ["compare"]:  # alone it would write the same report again
            assert run(monkeypatch, *arguments) == 0

    monkeypatch.setattr(scratch, "_hfpos", here)
    monkeypatch.setattr(scratch, "TOGETHER", 1)
    return given


def measured(text, schemes, changes=CHANGES):
    changes = (*changes, f"data.sources={text}/train.jsonl")
    return scratch.run(text / "runs", schemes, changes, (16, 32, 64), ("--data", str(text / "held_out.jsonl")))


def test_each_scheme_is_trained_once_and_measured_beside_the_others(text, commands, capsys):
    schemes = {"kerple": "kerple", "yarn": "{name: yarn, factor: 2}"}
    found = measured(text, schemes)
    assert commands == ["train", "train", "compare"]
    for name in schemes:
        assert describe(hfpos.from_pretrained(text / "runs" / name / "model")).scheme == name
    comparisons = load(text / "runs" / "report" / "results.json").comparisons
    assert [each.name for each in comparisons] == list(schemes)
    assert [each.model.native_scheme for each in comparisons] == ["kerple()", "yarn(factor=2)"]
    assert len({each.data.sha256 for each in comparisons}) == 1
    for each in comparisons:
        scores = each.runs[0].perplexity.by_length
        assert found["perplexity"][each.name] == {
            length: round(scores[length].perplexity, 3) for length in (16, 32, 64)
        }
        assert each.runs[0].profile.length == 64
    longest = [row[64] for row in found["perplexity"].values()]
    assert longest == sorted(longest)
    assert found["parameters"]["kerple"] > found["parameters"]["yarn"]
    report = {path.name for path in (text / "runs" / "report").iterdir()}
    assert {"index.html", "results.csv", "joint-perplexity.png", "joint-looks.png", "joint-heads.svg"} <= report
    assert "| trained from scratch with | 16 (trained) | 32 | 64 |" in capsys.readouterr().err
    json.dumps(found)

    commands.clear()
    assert measured(text, schemes) == found
    assert commands == ["compare"]
    with pytest.raises(AssertionError):  # `hfpos train` leaves what another recipe made
        measured(text, {"kerple": "kerple"}, (*CHANGES, "model.seed=1"))


def test_the_recipes_of_all_schemes_are_strictly_right_and_alike():
    assert "scratch" in BENCHMARKS
    issue = {"sinusoidal", "learned", "t5", "rope", "alibi", "kerple", "sandwich", "xpos", "fire", "nope"}
    assert scratch.SCHEMES.keys() == issue
    recipes = []
    for name, scheme in scratch.SCHEMES.items():
        recipe = Recipe.load(scratch.RECIPES / "scratch.yaml", (f"scheme={scheme}",))
        assert recipe.create_scheme().name == name
        recipes.append(recipe.values() | {"scheme": None})
    assert all(each == recipes[0] for each in recipes)
    assert (
        scratch.LENGTHS[0] == recipes[0]["data"]["length"] == recipes[0]["model"]["config"]["max_position_embeddings"]
    )


def test_a_command_that_fails_says_its_last_words(tmp_path):
    with pytest.raises(
        hfpos.PatchError, match=r"hfpos describe .*nowhere ... ended with 2: hfpos: .*nowhere is not a folder"
    ):
        scratch._hfpos("describe", tmp_path / "nowhere", threads=1)
