"""Curves so far above the others that they would squash them are cut at the upper edge, and the legend says so."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hfpos.report.numbers import number
from hfpos.report.plots.style import literal


if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from matplotlib.axes import Axes

    from hfpos.report.plots.style import Style

ROOM = 8  # perplexities up to this many times the worst that the best curve reaches are shown


def worst_of_best(curves: Iterable[Mapping[Any, float]]) -> float:
    """The largest value of the lower envelope of all curves (x -> y); 1 if there is no finite value.

    >>> worst_of_best([{1: 5.0, 2: 9.0}, {1: 7.0, 2: 1e5}])
    9.0
    """
    best: dict[Any, float] = {}
    for curve in curves:
        for x, y in curve.items():
            if math.isfinite(y):
                best[x] = min(y, best.get(x, math.inf))
    return max(best.values(), default=1.0)


def arrows_above(axes: Axes, curve: Mapping[Any, float], ceiling: float, look: Style) -> None:
    """An arrow at the upper edge for points above `ceiling`, at most about eight."""
    above = [x for x, y in curve.items() if not y <= ceiling]
    above = above[:: max(1, len(above) // 8)]
    (arrows,) = axes.plot(
        above,
        [0.985] * len(above),
        transform=axes.get_xaxis_transform(),
        linestyle="none",
        marker=r"$\uparrow$",
        markersize=9,
        color=look.colour,
        clip_on=False,
    )
    arrows.set_in_layout(False)  # or the layout makes room for them at the wrong place


def named(label: str, curve: Mapping[Any, float], ceiling: float) -> str:
    """The label for the legend, with how far the curve goes beyond the edge.

    >>> named("nope", {512: 1e5}, ceiling=80.0)
    'nope (↑ up to 100,000)'
    """
    above = [y for y in curve.values() if not y <= ceiling]
    return literal(f"{label} (↑ up to {number(max(above), 3)})" if above else label)
