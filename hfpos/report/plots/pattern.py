"""What each scheme does to attention, by distance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hfpos.report.plots.style import WIDTH, legend, length_axis, literal, mark, new_figure, plain_axes, styles_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hfpos.report.plots.style import Style
    from hfpos.report.results import Comparison, Pattern

_TITLES = {
    "rotation": ("Rotations: what is left of a perfect match at a distance", "share of its logit"),
    "bias": ("Biases: what is added to the logit at a distance (band: all heads)", "added to the logit"),
}


def pattern_figure(comparison: Comparison) -> Figure | None:
    """Attention logit against distance, one panel for rotations and one for biases; None if no run has a pattern."""
    patterns = {
        kind: {run.label: run.pattern for run in comparison.runs if run.pattern and run.pattern.kind == kind}
        for kind in _TITLES
    }
    kinds = [kind for kind, found in patterns.items() if found]
    if not kinds:
        return None
    figure = new_figure(1.0 + 3.2 * len(kinds))
    panels = figure.subplots(len(kinds), 1, squeeze=False)[:, 0]
    looks = styles_of(comparison)
    for axes, kind in zip(panels, kinds, strict=True):
        title, y = _TITLES[kind]
        plain_axes(axes, title, "distance between query and key (tokens)", y)
        for label, pattern in patterns[kind].items():
            _line(axes, label, pattern, looks[label])
        _distances(axes, list(patterns[kind].values()), comparison.model.trained_length)
    legend(figure, *panels)
    return figure


def _line(axes: Axes, label: str, pattern: Pattern, look: Style) -> None:
    # a distance of 0 has no place on a log axis, and minus infinity (a key that cannot be seen) none on this one
    rows = [
        row
        for row in zip(pattern.distances, pattern.low, pattern.middle, pattern.high, strict=True)
        if row[0] >= 1 and all(map(math.isfinite, row))
    ]
    distances, low, middle, high = zip(*rows, strict=True) if rows else ((), (), (), ())
    axes.plot(distances, middle, label=literal(label), **look.of_line(), linewidth=1.6)
    if low != high:
        axes.fill_between(distances, low, high, color=look.colour, alpha=0.15, linewidth=0)


def _distances(axes: Axes, patterns: list[Pattern], trained: int | None) -> None:
    longest = max(max(pattern.distances) for pattern in patterns)
    length_axis(axes, [2**power for power in range(max(1, longest).bit_length())], trained, inches=WIDTH - 1)
    axes.set_xlim(1, max(2, longest))
    if trained and trained < longest:
        mark(axes, trained, f"trained at {trained:,}")
