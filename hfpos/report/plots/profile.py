"""Where attention looks, by distance: the mean over all heads, and each head by itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hfpos.report.plots.style import WIDTH, legend, length_axis, literal, mark, new_figure, plain_axes, styles


if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hfpos.evaluate.attention_profile import AttentionProfile

_COLUMNS = 3
_FAINTEST = 1e-5  # mean weights below are drawn alike


def profile_figure(profiles: Mapping[str, AttentionProfile], trained: int | None) -> Figure | None:
    """The mean attention weight of one token against its distance, one line a run; None where nothing was measured."""
    if not profiles:
        return None
    figure = new_figure(4.8)
    axes = figure.subplots()
    plain_axes(
        axes,
        "Where attention looks: mean over all heads",
        "distance between query and key (tokens)",
        "weight of one key",
    )
    axes.set_yscale("log")
    for (label, profile), look in zip(profiles.items(), styles(profiles).values(), strict=True):
        # a distance of 0 has no place on a log axis
        points = [(x, y) for x, y in zip(profile.distances, profile.mean(), strict=True) if x and y >= _FAINTEST]
        axes.plot(*zip(*points, strict=True), label=literal(label), **look.of_line(), linewidth=1.6)
    longest = max(profile.length for profile in profiles.values())
    length_axis(axes, [2**power for power in range(longest.bit_length())], trained, inches=WIDTH - 1)
    if trained and trained < longest:
        mark(axes, trained, f"trained at {trained:,}")
    legend(figure, axes)
    return figure


def heads_figure(profiles: Mapping[str, AttentionProfile], trained: int | None) -> Figure | None:
    """The same as a heat map of heads and distances, one panel a run; None where nothing was measured."""
    if not profiles:
        return None
    from matplotlib.colors import LogNorm

    rows = math.ceil(len(profiles) / _COLUMNS)
    figure = new_figure(0.8 + 2.1 * rows)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for axes, (label, profile) in zip(panels, profiles.items(), strict=False):
        edges = [0.7, *profile.distances[1:], profile.length]  # a distance of 0 has no place on a log axis
        drawn = axes.pcolormesh(
            edges,
            range(len(profile.heads) + 1),
            [[max(weight, _FAINTEST) for weight in head] for head in profile.heads],
            norm=LogNorm(_FAINTEST, 1),
            cmap="viridis",
            rasterized=True,
        )
        _frame(axes, label, profile, max(each.length for each in profiles.values()), trained)
    for axes in panels[len(profiles) :]:
        axes.set_visible(False)
    figure.colorbar(drawn, ax=panels.tolist(), label="weight of one key", shrink=0.6)
    return figure


def _frame(axes: Axes, label: str, profile: AttentionProfile, longest: int, trained: int | None) -> None:
    """The axes of one panel, alike in all of them."""
    axes.set_title(literal(label), loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(0, longest.bit_length(), 3)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.7, longest)
    axes.set_yticks([])
    axes.invert_yaxis()
    heads = len(profile.heads) // profile.layers
    for layer in range(1, profile.layers):
        axes.axhline(layer * heads, color="white", linewidth=0.8)
    if trained and trained < profile.length:
        axes.axvline(trained, color="white", linestyle=(0, (4, 3)), linewidth=1)
