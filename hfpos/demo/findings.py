"""The demo's tables, and what they say in words; the words follow the numbers, whatever these are."""

from rich.table import Table

from hfpos.demo.measure import ALIBI, GROUPED, UNPATCHED, curve
from hfpos.evaluate import PerplexityResult, RetrievalResult


def table(scores: dict[str, PerplexityResult], trained: int) -> Table:
    """Perplexity, one row a scheme and one column a context length."""
    found = Table("scheme", box=None, header_style="bold", pad_edge=False, padding=(0, 2))
    for length in scores[UNPATCHED].by_length:
        found.add_column(f"{length} (trained)" if length == trained else str(length), justify="right")
    for name, result in scores.items():
        found.add_row(name, *(f"{value:.2f}" for value in curve(result).values()))
    return found


def recall_table(found: dict[str, RetrievalResult], trained: int) -> Table:
    """The share of key-value pairs recalled, one row a scheme and one column a context length."""
    lengths = sorted({cell.length for result in found.values() for cell in result.cells})
    drawn = Table("scheme", box=None, header_style="bold", pad_edge=False, padding=(0, 2))
    for length in lengths:
        drawn.add_column(f"{length} (trained)" if length == trained else str(length), justify="right")
    for name, result in found.items():
        drawn.add_row(name, *(f"{100 * result.accuracy_at(length):.0f} %" for length in lengths))
    return drawn


def untrained_findings(
    scores: dict[str, PerplexityResult], refused: dict[str, str], trained: int, best: str
) -> list[str]:
    """What the table of the schemes says, before any training."""
    none, found = curve(scores[UNPATCHED]), curve(scores[best])
    longest = max(none)
    if found[longest] < none[longest]:
        lines = [
            f"best scaling at {longest}: {best}, {_change(none[longest], found[longest])} against the unpatched model"
        ]
    else:
        lines = [
            f"at {longest} the unpatched model is still better ({_change(found[longest], none[longest])}) than the best "
            f"scaling, {best}: it does not need one yet; try a larger factor"
        ]
    lines.append(f"what {best} costs at {trained}, where nothing was wrong: {_change(none[trained], found[trained])}")
    if GROUPED in scores:
        grouped = curve(scores[GROUPED])[longest]
        lines.append(
            f"{GROUPED} at {longest}: {_change(none[longest], grouped)} against the unpatched model. It scales nothing: far "
            "positions are shared by neighbours, which costs time in attention instead of training"
        )
    if ALIBI in scores:
        alibi = curve(scores[ALIBI])[longest]
        lines.append(
            f"alibi at {longest}: {_change(none[longest], alibi)} against the unpatched model. It replaces the rotary "
            "positions this model was trained with instead of stretching them, so it is of no use before training"
        )
    return lines + [f"{name} does not fit this model: {reason}" for name, reason in refused.items()]


def tuned(scheme: str) -> str:
    """The name of a scheme's row after fine-tuning."""
    return f"{scheme}, fine-tuned"


def finetuned_findings(scores: dict[str, PerplexityResult], trained: int, best: str) -> list[str]:
    """What the fine-tuning changed."""
    names = (UNPATCHED, best, tuned(UNPATCHED), tuned(best))
    none, before, control, after = (curve(scores[name]) for name in names)
    longest = max(none)
    return [
        f"at {longest}: {_change(before[longest], after[longest])} by the fine-tuning, and now "
        f"{_change(none[trained], after[longest])} against what the unpatched model reached at its trained {trained}",
        f"at {trained}: {_change(none[trained], after[trained])} against the unpatched model",
        f"the same training without a scheme reaches {control[longest]:.2f} at {longest}: the scheme itself is worth "
        f"{_change(control[longest], after[longest])}",
    ]


def _change(before: float, after: float) -> str:
    """Say how a perplexity changed.

    >>> _change(20.0, 19.0)
    '20.00 -> 19.00 (-5.0 %)'
    """
    return f"{before:.2f} -> {after:.2f} ({100 * (after / before - 1):+.1f} %)"
