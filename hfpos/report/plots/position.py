"""Loss by position in the window."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hfpos.report.plots.edge import ROOM, arrows_above, named, worst_of_best
from hfpos.report.plots.style import legend, mark, new_figure, plain_axes, styles_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hfpos.evaluate.result import Bucket
    from hfpos.report.results import Comparison


def position_figure(comparison: Comparison) -> Figure | None:
    """Mean loss against the tokens before a token, at the longest length, one line a run; None without curves."""
    longest = comparison.lengths[-1] if comparison.lengths else 0
    curves = {
        label: result.by_length[longest].curve
        for label, result in comparison.scores.items()
        if longest in result.by_length and result.by_length[longest].curve
    }
    if not curves:
        return None
    looks, trained = styles_of(comparison), comparison.model.trained_length
    figure = new_figure(4.6)
    axes = figure.subplots()
    plain_axes(
        axes,
        f"Loss of {comparison.name} by position in windows of {longest:,} tokens",
        "position in the window (tokens before it)",
        "mean loss (nats; lower is better)",
    )
    values = {label: {_middle(bucket): bucket.nll for bucket in curve} for label, curve in curves.items()}
    ceiling = worst_of_best(values.values()) + math.log(ROOM)
    shown = [loss for curve in values.values() for loss in curve.values() if loss <= ceiling]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    axes.set_ylim(low - 0.05 * (high - low + 1), high + 0.05 * (high - low + 1))
    for label, curve in values.items():
        finite = {position: loss for position, loss in curve.items() if math.isfinite(loss)}
        axes.plot(
            list(finite),
            list(finite.values()),
            label=named(label, curve, ceiling),
            **looks[label].of_line(),
            linewidth=1.6,
            marker=looks[label].marker,
            markersize=4,
            markevery=max(1, len(finite) // 8),
        )
        arrows_above(axes, curve, ceiling, looks[label])
    axes.set_xlim(0, longest)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if trained and trained < longest:
        mark(axes, trained, f"trained at {trained:,}")
    legend(figure, axes)
    return figure


def _middle(bucket: Bucket) -> float:
    return (bucket.start + bucket.stop - 1) / 2
