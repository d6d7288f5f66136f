"""Perplexity against context length."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from hfpos.report.plots.edge import ROOM, arrows_above, named, worst_of_best
from hfpos.report.plots.style import (
    WIDTH,
    Style,
    legend,
    length_axis,
    mark,
    new_figure,
    plain_axes,
    require_matplotlib,
    styles,
    styles_of,
)


if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hfpos.evaluate.result import PerplexityResult
    from hfpos.report.results import Comparison


class Point(NamedTuple):
    """A perplexity and its standard error."""

    value: float
    stderr: float | None = None


def perplexity_figure(comparison: Comparison) -> Figure | None:
    """Perplexity against context length, one line a run; None if no perplexity was measured."""
    if not comparison.scores:
        return None
    return joint_figure(
        comparison.scores,
        comparison.model.trained_length,
        title=f"Perplexity of {comparison.name} against context length",
        looks=styles_of(comparison),
    )


def joint_figure(
    scores: Mapping[str, PerplexityResult],
    trained: int | None,
    *,
    title: str,
    looks: Mapping[str, Style] | None = None,
) -> Figure:
    """The same for any labelled scores.

    Args:
        scores: label -> perplexity, at least one.
        trained: the trained length to mark, if there is one.
        title: above the picture.
        looks: label -> style; by the order of the labels unless given.
    """
    curves = {
        label: {length: Point(score.perplexity, score.stderr) for length, score in result.by_length.items()}
        for label, result in scores.items()
    }
    return _draw(curves, trained, title, looks or styles(curves))


def plot_perplexity(
    curves: Mapping[str, Mapping[int, float]], trained_length: int, path: Path, *, title: str, emphasised: str = ""
) -> None:
    """Draw perplexity against context length, one line a scheme, and save it as PNG.

    Args:
        curves: label -> context length in tokens -> perplexity.
        trained_length: marked by a vertical line.
        path: the file to write.
        title: above the plot.
        emphasised: the label of the curve to draw thicker than the others; "" for none.
    """
    require_matplotlib()
    points = {label: {length: Point(value) for length, value in curve.items()} for label, curve in curves.items()}
    _draw(points, trained_length, title, styles(points), emphasised).savefig(path, dpi=150)


def _draw(
    curves: Mapping[str, Mapping[int, Point]],
    trained: int | None,
    title: str,
    looks: Mapping[str, Style],
    emphasised: str = "",
) -> Figure:
    lengths = sorted({length for curve in curves.values() for length in curve})
    figure = new_figure(4.8)
    axes = figure.subplots()
    plain_axes(axes, title, "context length (tokens)", "perplexity (lower is better)")
    values = {label: {length: point.value for length, point in curve.items()} for label, curve in curves.items()}
    ceiling = ROOM * worst_of_best(values.values())
    shown = [value for curve in values.values() for value in curve.values() if value <= ceiling]
    low, high = (min(shown), max(shown)) if shown else (1.0, 2.0)
    _value_axis(axes, low, max(high, 2 * low))  # an octave at least, so that noise looks small
    for label, curve in curves.items():
        _line(axes, named(label, values[label], ceiling), curve, looks[label], thick=label == emphasised)
        arrows_above(axes, values[label], ceiling, looks[label])
    length_axis(axes, sorted({*lengths, *([trained] if trained else [])}), trained, inches=WIDTH - 1)
    if trained:
        mark(axes, trained, f"trained at {trained:,}")
    legend(figure, axes)
    return figure


def _line(axes: Axes, label: str, curve: Mapping[int, Point], look: Style, *, thick: bool) -> None:
    finite = {length: point for length, point in sorted(curve.items()) if math.isfinite(point.value)}
    axes.plot(
        list(finite),
        [point.value for point in finite.values()],
        label=label,
        **look.of_line(),
        marker=look.marker,
        markersize=7 if thick else 5,
        linewidth=3 if thick else 1.6,
    )
    band = {length: point for length, point in finite.items() if point.stderr}
    axes.fill_between(
        list(band),
        [max(point.value - (point.stderr or 0), point.value / 100) for point in band.values()],
        [point.value + (point.stderr or 0) for point in band.values()],
        color=look.colour,
        alpha=0.15,
        linewidth=0,
    )


def _value_axis(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log", base=2)
    axes.set_ylim(low / 1.1, high * 1.12)
    ticks = _ticks(low, high)
    axes.set_yticks(ticks, [f"{tick:,g}" if tick < 1e6 else f"{tick:.0e}" for tick in ticks])
    axes.minorticks_off()


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`: 1, 1.5, 2, 3, 4, 6 ... where few octaves are shown, else powers of 2, else of 10.

    >>> _ticks(4.2, 33.0)
    [4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0]
    >>> _ticks(4.2, 33000.0)
    [10.0, 100.0, 1000.0, 10000.0]
    """
    octaves = math.log2(high / low)
    if octaves > 10:
        numbers = [10.0**power for power in range(0, 309)]
    else:
        numbers = [base * 2.0**octave for octave in range(0, 200) for base in ((1, 1.5) if octaves < 5 else (1,))]
    return [value for value in numbers if low / 1.1 <= value <= high * 1.1]
