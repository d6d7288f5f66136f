"""What all pictures have in common: colours, sizes, axes of lengths, and how they are saved."""

from __future__ import annotations

import io
import math
import re
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hfpos.report.results import Comparison

WIDTH = 8.0  # inches: at this width the text is 10 point on screen and 8 point on an A4 page
# Okabe and Ito's colours, which stay apart for colour-blind readers; yellow is left out, it is too pale on white.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")
_LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "hfpos"}  # text stays text; the same picture gets the same ids


class Style(NamedTuple):
    """How the line of one label is drawn: never told apart by its colour alone."""

    colour: str
    line: Any
    marker: str

    def of_line(self) -> dict[str, Any]:
        """The arguments of `Axes.plot` for a line without markers."""
        return {"color": self.colour, "linestyle": self.line}


def require_matplotlib() -> None:
    """Raise `PatchError` if there is no matplotlib, so that a long run can fail at its start."""
    if find_spec("matplotlib") is None:
        raise PatchError("plots need matplotlib, which is not installed; pip install 'hfpos[plot]'")


def styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label; the same order gives the same styles."""
    return {
        label: Style(_COLOURS[i % len(_COLOURS)], _LINES[i % len(_LINES)], _MARKERS[i % len(_MARKERS)])
        for i, label in enumerate(labels)
    }


def styles_of(comparison: Comparison) -> dict[str, Style]:
    """The styles of a comparison's runs, the same in all its pictures."""
    return styles(run.label for run in comparison.runs)


def new_figure(height: float) -> Figure:
    """An empty figure of `height` inches that needs no display."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, folder: Path, stem: str) -> tuple[Path, Path]:
    """Write `stem`.png (150 dpi) and `stem`.svg (its text is text) into `folder`; the same figure gives the same bytes."""
    png, vector = folder / f"{stem}.png", folder / f"{stem}.svg"
    figure.savefig(png, dpi=150, metadata={"Software": None})
    vector.write_text(_svg_file(figure), encoding="utf-8")
    return png, vector


def svg(figure: Figure, prefix: str, title: str) -> str:
    """The figure as an element to put into an HTML page.

    Args:
        prefix: put before every id, so that several pictures can stand on one page.
        title: what a screen reader says.
    """
    text = _svg_file(figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r' xmlns(:\w+)?="[^"]*"', "", text
    )  # HTML knows them, and a page without addresses is easier to trust
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'( id="|url\(#|href="#)', rf"\1{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(title, quote=True)}" ', 1)


def _svg_file(figure: Figure) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(_SVG):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def literal(text: str) -> str:
    r"""Text that matplotlib draws as it is: no `$` starts a formula, and no label is left out for its underscore.

    >>> print(literal("_a$b"))
     _a\$b
    """
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def plain_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, labels, a faint grid and no frame on the right and above."""
    axes.set_title(literal(title), loc="left", pad=20, fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, *panels: Axes) -> None:
    """The labels in rows under the picture, where they cover no line."""
    found = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    widest = max(len(label) for _, label in found)
    columns = max(1, min(len(found), int(WIDTH / (0.7 + 0.08 * widest))))
    figure.legend(
        *zip(*found, strict=True),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=4,
        columnspacing=1.5,
    )


def mark(axes: Axes, length: float, text: str, *, horizontal: bool = False) -> None:
    """A dashed line at a length, named at the edge of the axes where no curve is."""
    if horizontal:
        axes.axhline(length, color="dimgrey", linestyle=(0, (4, 3)), linewidth=1, zorder=1)
        return
    axes.axvline(length, color="dimgrey", linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    axes.annotate(
        text,
        (length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        color="dimgrey",
        annotation_clip=False,
    )


def length_axis(axes: Axes, lengths: Sequence[int], keep: int | None, inches: float) -> None:
    """A log2 x axis with as many of `lengths` named as fit side by side; all have a tick.

    Args:
        keep: the length that is named in any case, if it is one of them.
        inches: how wide the axes are.
    """
    first, last = min(lengths), max(lengths)
    margin = (last / first) ** 0.04 if last > first else 1.5
    axes.set_xscale("log", base=2)
    axes.set_xlim(first / margin, last * margin)
    named = spaced(lengths, keep, inches)
    axes.set_xticks(named, [f"{length:,}" for length in named])
    axes.set_xticks(lengths, minor=True, labels=[""] * len(lengths))


def spaced(lengths: Sequence[int], keep: int | None, inches: float) -> list[int]:
    """The lengths whose names do not touch on a log axis: the longest, `keep`, and then what fits, longest first.

    >>> spaced([1000, 1024, 2048, 4096, 4100], 1024, inches=3)
    [1024, 2048, 4100]
    """
    ordered = sorted(lengths, reverse=True)
    scale = inches / max(math.log2(ordered[0] / ordered[-1]), 1e-9)
    first = [ordered[0], *([keep] if keep in ordered else [])]
    named: list[int] = []
    for length in dict.fromkeys([*first, *ordered]):
        gaps = (abs(math.log2(length / other)) * scale - _width(length, other) for other in named)
        if all(gap > 0 for gap in gaps):
            named.append(length)
    return sorted(named)


def _width(*lengths: int) -> float:
    """Inches between the centres of two names that stand just beside each other."""
    return 0.15 + sum(len(f"{length:,}") for length in lengths) / 2 * 0.085
