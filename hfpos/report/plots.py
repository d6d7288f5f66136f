"""Plots of results. Needs the `plot` extra (matplotlib); nothing else in hfpos does."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from hfpos.scheme import PatchError


# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")


def require_matplotlib() -> None:
    """Raise `PatchError` if there is no matplotlib, so that a long run can fail at its start."""
    if find_spec("matplotlib") is None:
        raise PatchError("plots need matplotlib, which is not installed; pip install 'hfpos[plot]'")


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (label, curve) in enumerate(curves.items()):
        thick = label == emphasised
        axes.plot(
            list(curve),
            list(curve.values()),
            label=label,
            color=_COLOURS[number % len(_COLOURS)],
            marker="o",
            markersize=6 if thick else 4,
            linewidth=3 if thick else 1.5,
        )
    axes.axvline(trained_length, color="grey", linestyle="--", linewidth=1)
    axes.annotate(
        f" trained length: {trained_length}",
        (trained_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(2, -4),
        textcoords="offset points",
        va="top",
        color="dimgrey",
    )
    lengths = sorted({length for curve in curves.values() for length in curve})
    values = [value for curve in curves.values() for value in curve.values()]
    smallest, largest = min(values), max(max(values), 2 * min(values))  # an octave at least, so that noise looks small
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_yscale("log", base=2)
    axes.set_ylim(smallest / 1.1, largest * 1.25)  # room for the label of the trained length
    ticks = _ticks(smallest, largest)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("perplexity on held-out text (lower is better)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path)


def _ticks(smallest: float, largest: float) -> list[float]:
    """Round numbers from `smallest` to `largest`, about half an octave apart.

    >>> _ticks(4.2, 33.0)
    [4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0]
    """
    round_numbers = [base * 2.0**octave for octave in range(-2, 40) for base in (1, 1.5)]
    return [value for value in round_numbers if smallest / 1.1 <= value <= largest * 1.1]
