"""Several comparisons side by side: names that tell them apart, one table, and pictures of where attention looks."""

import dataclasses

import pytest

from hfpos.evaluate.attention_profile import AttentionProfile
from hfpos.report.joint import distinct_names, joint_profiles, joint_scores
from hfpos.report.pictures import all_pictures
from hfpos.report.plots import heads_figure, profile_figure
from hfpos.report.results import Results, load, save
from hfpos.report.tables import markdown
from tests.report.examples import NONE, YARN, comparison, run


NEAR = AttentionProfile(512, (0, 1, 2, 4, 128), ((0.5, 0.2, 0.1, 1e-3, 0.0), (0.4, 0.1, 0.1, 1e-2, 1e-4)), 1)
EVEN = AttentionProfile(512, (0, 1, 2, 4, 128), ((2e-3,) * 5, (2e-3,) * 5, (1e-3,) * 5, (1e-3,) * 5), 2)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/scratch/alibi/model", "runs/scratch/rope/model"], ["alibi", "rope"]),
        (["/a/alibi", "/a/rope"], ["alibi", "rope"]),
        (["org/one-7b", "other/one-7b"], ["org", "other"]),
        (["a/b", "a/b/c"], ["1 b", "2 c"]),
        (["base", "tuned/model"], ["base", "tuned/model"]),
    ],
)
def test_names_that_tell_apart(paths, names):
    assert distinct_names(paths) == names


def models(**profiles):
    runs = {"alibi": NONE, "rope": YARN}
    return Results(
        tuple(
            dataclasses.replace(
                comparison(run("none", values, profile=profiles.get(name)), path=f"runs/{name}/model"), title=name
            )
            for name, values in runs.items()
        )
    )


def test_models_stand_in_one_table_under_their_names(tmp_path):
    results = models()
    assert list(joint_scores(results)) == ["alibi", "rope"]
    text = markdown(results)
    assert text.startswith("## All runs together")
    assert "| alibi | **21.30** ± 0.50 | **20.10** ± 0.50 | 26.70 ± 0.50 | 37.70 ± 0.50 |" in text
    assert "| rope | 23.10 ± 0.50 | 22.30 ± 0.50 | **21.90** ± 0.50 | **21.00** ± 0.50 |" in text
    assert "## alibi" in text
    save(results, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == results


def test_several_schemes_keep_both_names():
    two = comparison(run("none", NONE), run("yarn", YARN), path="a/base")
    other = comparison(run("none", NONE), path="a/tuned")
    assert list(joint_scores(Results((two, other)))) == ["base: none", "base: yarn", "tuned: none"]
    assert list(joint_scores(Results((two, two)))) == ["1 base: none", "1 base: yarn", "2 base: none", "2 base: yarn"]


def test_what_was_measured_otherwise_does_not_stand_side_by_side():
    results = Results(
        (comparison(run("none", NONE), path="a"), comparison(run("none", YARN), path="b", sha="cd" * 32))
    )
    assert joint_scores(results) == {}
    assert not markdown(results).startswith("## All runs")


def test_profiles_are_drawn_of_each_and_of_all():
    results = models(alibi=NEAR, rope=EVEN)
    assert joint_profiles(results) == {"alibi": NEAR, "rope": EVEN}
    joint, *each = all_pictures(results)
    assert [picture.stem for picture in joint] == ["joint-perplexity", "joint-looks", "joint-heads"]
    assert [picture.stem for picture in each[1]] == ["2-perplexity", "2-positions", "2-looks", "2-heads"]
    assert [picture.stem for picture in all_pictures(models())[0]] == ["joint-perplexity"]


def test_a_line_is_the_mean_over_heads_and_leaves_out_what_has_no_place():
    (axes,) = profile_figure({"near": NEAR, "_even": EVEN}, 128).axes
    near, even = axes.get_lines()[:2]
    assert near.get_xydata().tolist() == [
        pytest.approx(pair) for pair in ((1, 0.15), (2, 0.1), (4, 5.5e-3), (128, 5e-5))
    ]
    assert even.get_label() == " _even"
    assert [text.get_text() for text in axes.texts] == ["trained at 128"]
    assert profile_figure({}, 128) is None


def test_a_panel_has_a_row_for_each_head():
    figure = heads_figure({"near": NEAR, "even": EVEN}, 128)
    near, even = [axes for axes in figure.axes if axes.get_title(loc="left")]
    drawn = even.collections[0].get_array()
    assert drawn.shape == (4, 5)
    assert even.get_ylim() == (4, 0), "the first layer at the top"
    assert near.collections[0].get_array().min() == pytest.approx(1e-5)
    assert [axes.get_title(loc="left") for axes in (near, even)] == ["near", "even"]
    assert heads_figure({}, None) is None
