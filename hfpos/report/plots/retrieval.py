"""Retrieval as a heat map of context length and depth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hfpos.report.numbers import share
from hfpos.report.plots.style import WIDTH, literal, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hfpos.evaluate.retrieval import RetrievalResult
    from hfpos.report.results import Comparison


def retrieval_figure(comparison: Comparison, task: str) -> Figure | None:
    """Accuracy by context length and depth, a panel for each run that was given the task; None if none was."""
    results = {run.label: each for run in comparison.runs for each in run.retrieval if each.task == task}
    if not results:
        return None
    cells = [cell for result in results.values() for cell in result.cells]
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    columns = min(len(results), max(1, int((WIDTH - 1.2) / max(1.9, 0.42 * len(lengths)))))
    rows = math.ceil(len(results) / columns)
    figure = new_figure(1.1 + rows * max(1.7, 0.7 + 0.27 * len(depths)))
    chance = next(iter(results.values())).chance
    figure.suptitle(
        f"{literal(task)}: found, in % (guessing finds {share(chance)})",
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize=11,
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True, subplot_kw={"frame_on": False})
    for axes in panels.flat[len(results) :]:
        axes.set_axis_off()
    for axes, (label, result) in zip(panels.flat, results.items(), strict=False):
        _panel(axes, label, result, lengths, depths)
        axes.tick_params(labelbottom=True)
    figure.supxlabel("context length (tokens)", fontsize=10)
    figure.supylabel("depth (0 %: start of the context)", fontsize=10)
    return figure


def _panel(axes: Axes, label: str, result: RetrievalResult, lengths: list[int], depths: list[float]) -> None:
    import numpy as np

    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in result.cells:
        grid[depths.index(cell.depth), lengths.index(cell.length)] = 100 * cell.correct / cell.trials
    # cells as shapes, not as an image, which would be blurred in an SVG
    axes.pcolormesh(grid, vmin=0, vmax=100, cmap="Blues", edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    for (row, column), value in np.ndenumerate(grid):
        text, colour = ("-", "black") if np.isnan(value) else (f"{value:.0f}", "white" if value > 55 else "black")
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=8)
    axes.set_title(literal(label), loc="left", fontsize=10)
    axes.set_xticks(
        [column + 0.5 for column in range(len(lengths))], [_short(length) for length in lengths], fontsize=8
    )
    axes.set_yticks(
        [row + 0.5 for row in range(len(depths))], [f"{100 * depth:.0f} %" for depth in depths], fontsize=8
    )
    axes.tick_params(length=0)


def _short(length: int) -> str:
    """A length that fits over a narrow column.

    >>> _short(512), _short(16384), _short(5000)
    ('512', '16k', '5000')
    """
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
