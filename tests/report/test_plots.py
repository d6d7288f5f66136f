"""The pictures: what they show, also where there is little to show."""

import dataclasses
import math

import pytest

import hfpos
from hfpos.report.pictures import pictures
from hfpos.report.plots import (
    pattern_figure,
    perplexity_figure,
    position_figure,
    retrieval_figure,
    save_figure,
    wavelength_figure,
    wavelengths_figure,
)
from hfpos.report.plots.style import spaced, styles, styles_of
from tests.report.examples import NONE, YARN, comparison, full, retrieval, rotation, run, scores
from tests.tiny import tiny


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_perplexity_shows_every_run_and_cuts_outliers():
    figure = perplexity_figure(full())
    axes = figure.axes[0]
    assert legend_of(figure) == ["none", "yarn(factor=4)", "alibi (↑ up to inf)"]
    assert axes.get_ylim()[1] < 50
    assert [text.get_text() for text in axes.texts] == ["trained at 128"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "128", "256", "512"]


def test_an_outlier_that_is_the_best_there_is_is_shown():
    figure = perplexity_figure(comparison(run("none", (9.0, 9.0, 9.0, 1e5)), run("yarn", (9.0, 9.0, 9.0, 2e5))))
    assert figure.axes[0].get_ylim()[1] > 2e5


@pytest.mark.parametrize("trained", [None, 64, 4096])
def test_one_run_one_length(trained, tmp_path):
    given = comparison(run("none", scores((20.0,), lengths=(64,), stderr=None)), trained=trained)
    for draw in (perplexity_figure, position_figure):
        assert all(path.stat().st_size for path in save_figure(draw(given), tmp_path, draw.__name__))


def test_only_infinite_perplexities(tmp_path):
    save_figure(perplexity_figure(comparison(run("none", (math.inf,) * 4))), tmp_path, "infinite")


def test_nothing_to_draw():
    given = comparison(run("none", None))
    assert (
        perplexity_figure(given)
        is position_figure(given)
        is wavelengths_figure(given)
        is pattern_figure(given)
        is None
    )
    assert retrieval_figure(given, "passkey") is None
    assert pictures(given) == []


def test_names_of_many_lengths_do_not_touch():
    lengths = list(range(256, 4097, 256))
    axes = perplexity_figure(comparison(run("none", scores([20.0] * 16, lengths=lengths)), trained=1024)).axes[0]
    named = spaced(lengths, 1024, inches=7)
    assert sorted({*axes.get_xticks(), *axes.get_xticks(minor=True)}) == lengths
    assert list(axes.get_xticks()) == named
    assert {1024, 4096} <= set(named) < set(lengths)


def test_position_of_the_longest_length():
    axes = position_figure(full()).axes[0]
    assert list(axes.lines[0].get_xdata()) == [64.0, 319.5]
    assert axes.lines[0].get_ydata()[1] == pytest.approx(math.log(37.7))


def test_a_label_looks_the_same_everywhere_and_unlike_the_others():
    given = full()
    looks = styles_of(given)
    for draw in (perplexity_figure, position_figure):
        drawn = {line.get_label(): line.get_color() for line in draw(given).axes[0].lines}
        assert drawn["yarn(factor=4)"] == looks["yarn(factor=4)"].colour
    assert len(set(styles(map(str, range(30))).values())) == 30


def test_heat_map_writes_the_accuracy_into_each_cell():
    figure = retrieval_figure(full(), "passkey")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["none", "yarn(factor=4)"]
    cells = {(*text.get_position(), text.get_text()) for text in figure.axes[0].texts}
    assert cells == {(0.5, 0.5, "100"), (0.5, 1.5, "90"), (1.5, 0.5, "10"), (1.5, 1.5, "0")}
    assert [text.get_color() for text in figure.axes[0].texts] == ["white", "black", "white", "black"]
    assert "guessing finds 10 %" in figure.get_suptitle()


def test_heat_map_with_a_gap():
    results = [retrieval(1, 2, 3, 4), retrieval(1, 2, 3, 4)]
    results[1] = dataclasses.replace(results[1], cells=results[1].cells[:3])
    figure = retrieval_figure(
        comparison(*(run(name, None, retrieval=(each,)) for name, each in zip("ab", results, strict=True))), "passkey"
    )
    assert [text.get_text() for text in figure.axes[1].texts] == ["10", "30", "20", "-"]


def test_changed_wavelengths_are_shaded():
    none, yarn = wavelengths_figure(full()).axes
    assert len(none.patches) == 0
    assert [patch.get_x() for patch in yarn.patches] == [0.5, 1.5]  # pair 0 is as it was, pair 3 stands still in both
    assert [list(line.get_xdata()) for line in yarn.lines if line.get_marker() == "_"] == [[3]]


def test_wavelengths_without_those_of_the_reference():
    figure = wavelengths_figure(comparison(run("none", NONE), rotation("rope", YARN, (6.3, 60.0)), trained=None))
    assert [len(axes.patches) for axes in figure.axes] == [0]


def test_wavelengths_of_a_live_model(tmp_path):
    model = tiny("llama")
    unscaled = hfpos.describe(model).wavelengths
    with hfpos.patched(model, "linear", factor=4):
        description = hfpos.describe(model)
    figure = wavelength_figure(description, unscaled)
    assert len(figure.axes[0].patches) == len(unscaled)
    save_figure(figure, tmp_path, "wavelengths")
    assert len(wavelength_figure(description).axes[0].patches) == 0
    with hfpos.patched(model, "nope"), pytest.raises(hfpos.PatchError, match="rotates nothing by fixed frequencies"):
        wavelength_figure(hfpos.describe(model))


def test_patterns_have_a_panel_a_kind():
    rotations, biases = pattern_figure(full()).axes
    assert [line.get_label() for line in rotations.lines[:2]] == ["none", "yarn(factor=4)"]
    assert list(rotations.lines[0].get_xdata()) == [1, 2, 600]
    assert list(biases.lines[0].get_xdata()) == [1]  # the key at 600 cannot be seen: minus infinity
    assert len(pattern_figure(comparison(rotation("none", NONE, ()))).axes) == 1


def test_saved_twice_is_the_same(tmp_path):
    given = comparison(run("$none_", (20.0, 20.0, 20.0, 20.0)), run("_yarn", YARN))
    first, second = (save_figure(perplexity_figure(given), tmp_path, stem) for stem in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    vector = first[1].read_text(encoding="utf-8")
    assert "$none_" in vector  # text stays text, and is no formula
    assert "_yarn" in vector
    assert "<dc:date>" not in vector
