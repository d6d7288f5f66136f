"""Rotary wavelengths: how far one turn of each pair of dimensions reaches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hfpos.describe import describe
from hfpos.families import family_of
from hfpos.patching import language_model
from hfpos.report.plots.style import Style, literal, mark, new_figure, plain_axes, styles, styles_of
from hfpos.rotation import inverse_frequencies
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import nn

    from hfpos.describe import Description
    from hfpos.report.results import Comparison

_CHANGED = 1e-3  # a wavelength that differs by more than this share counts as changed
_SHADE = "#F0E442"
_X_LABEL = "pair of dimensions (0 turns fastest)"


def wavelengths_figure(comparison: Comparison) -> Figure | None:
    """Wavelength of each dimension pair, a panel for each run that rotates by fixed frequencies; None if none does."""
    runs = [run for run in comparison.runs if run.wavelengths]
    if not runs:
        return None
    columns = 2 if len(runs) == 4 else min(3, len(runs))
    rows = math.ceil(len(runs) / columns)
    figure = new_figure(1.0 + 2.6 * rows)
    figure.suptitle(
        literal(f"Rotary wavelengths of {comparison.name}"), x=0.01, ha="left", fontweight="bold", fontsize=11
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(runs) :]:
        axes.set_axis_off()
    looks, reference = styles_of(comparison), comparison.runs[0].wavelengths
    longest = max((*comparison.lengths, *comparison.protocol.lengths), default=None)
    for axes, run in zip(panels.flat, runs, strict=False):
        _panel(axes, run.wavelengths, reference, comparison.model.trained_length, longest, looks[run.label])
        axes.set_title(literal(run.label), loc="left", fontsize=10)
        axes.set_xlabel(_X_LABEL, fontsize=9)
        axes.tick_params(labelbottom=True)
    figure.supylabel("wavelength (tokens)", fontsize=10)
    _legend(figure, reference=literal(comparison.runs[0].label) if reference else "", target="longest measured")
    return figure


def plot_wavelengths(model: nn.Module, path: Path) -> None:
    """Draw the rotary wavelengths of a live model into a .png, .svg or .pdf file, the pairs that its scheme changes shaded.

    Raises:
        PatchError: the model rotates nothing by fixed frequencies, or the file is of another kind.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise PatchError(f"{path} is no kind of picture known here; expected a name that ends in .png, .svg or .pdf")
    geometry = family_of(language_model(model)).geometry()
    frequencies = inverse_frequencies(geometry.theta, geometry.rotary_dim).tolist()
    found = describe(model)
    same_pairs = len(frequencies) == len(found.wavelengths)
    unscaled = [2 * math.pi / value for value in frequencies] if same_pairs else None
    wavelength_figure(found, unscaled).savefig(path, dpi=150)


def wavelength_figure(description: Description, unscaled: Sequence[float] | None = None) -> Figure:
    """The same for one model.

    Args:
        description: what `hfpos.describe(model)` returned.
        unscaled: the wavelengths without the scheme, in the same order, to show which pairs it changes.

    Raises:
        PatchError: the model rotates nothing by fixed frequencies.
    """
    if not description.wavelengths:
        raise PatchError(
            f"{description.model} under {description.scheme!r} rotates nothing by fixed frequencies, so there are no "
            "wavelengths to draw; expected a model with rotary embeddings"
        )
    figure = new_figure(4.6)
    axes = figure.subplots()
    plain_axes(
        axes,
        f"Rotary wavelengths of {description.model} under {description.scheme}",
        _X_LABEL,
        "wavelength (tokens)",
    )
    look = styles([description.scheme])[description.scheme]
    _panel(axes, description.wavelengths, unscaled or (), description.trained_length, description.patched_length, look)
    _legend(figure, reference="unscaled" if unscaled else "", target="length it is meant for")
    return figure


def _panel(
    axes: Axes,
    wavelengths: Sequence[float | None],
    reference: Sequence[float | None],
    trained: int | None,
    target: int | None,
    look: Style,
) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(wavelengths) - 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(reference) == len(wavelengths):
        for pair in _changed(wavelengths, reference):
            axes.axvspan(pair - 0.5, pair + 0.5, color=_SHADE, alpha=0.35, linewidth=0, zorder=0)
        moving = _moving(reference)
        axes.plot(list(moving), list(moving.values()), color="grey", linewidth=1, zorder=2)
    moving = _moving(wavelengths)
    axes.plot(
        list(moving), list(moving.values()), color=look.colour, linestyle="none", marker=look.marker, markersize=4
    )
    still = [pair for pair in range(len(wavelengths)) if pair not in moving]
    axes.plot(
        still,
        [0.97] * len(still),
        transform=axes.get_xaxis_transform(),
        linestyle="none",
        marker="_",
        markersize=6,
        markeredgewidth=2,
        color=look.colour,
    )
    if trained:
        mark(axes, trained, "", horizontal=True)
    if target and target != trained:
        axes.axhline(target, color="dimgrey", linestyle=":", linewidth=1.4, zorder=1)


def _legend(figure: Figure, *, reference: str, target: str) -> None:
    """What the signs mean; the runs are named above their panels. `reference` "" where none is drawn."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    signs: list[Line2D | Patch] = [
        Line2D([], [], color="black", linestyle="none", marker="o", markersize=4, label="wavelength"),
        Line2D([], [], color="black", linestyle="none", marker="_", markeredgewidth=2, label="stands still"),
        Line2D([], [], color="dimgrey", linestyle=(0, (4, 3)), linewidth=1, label="trained length"),
        Line2D([], [], color="dimgrey", linestyle=":", linewidth=1.4, label=target),
    ]
    if reference:
        signs.append(Line2D([], [], color="grey", linewidth=1, label=reference))
        signs.append(Patch(color=_SHADE, alpha=0.35, label="changed"))
    figure.legend(handles=signs, loc="outside lower center", ncols=6, frameon=False, fontsize=9, columnspacing=1.2)


def _moving(wavelengths: Sequence[float | None]) -> dict[int, float]:
    """The wavelengths of the pairs that turn, by pair."""
    return {pair: length for pair, length in enumerate(wavelengths) if length is not None and math.isfinite(length)}


def _changed(new: Sequence[float | None], old: Sequence[float | None]) -> list[int]:
    """The pairs whose wavelength differs noticeably, or that stand still in one of the two only."""
    after, before = _moving(new), _moving(old)
    return [
        pair
        for pair in after.keys() | before.keys()
        if abs(after.get(pair, math.inf) / before.get(pair, math.inf) - 1) > _CHANGED
    ]
