"""The demo's tables, and what they say in words; the words follow the numbers, whatever these are."""

from rich.table import Table

from hfpos.demo.measure import ALIBI, UNPATCHED, curve
from hfpos.evaluate import PerplexityResult


def table(title: str, scores: dict[str, PerplexityResult], trained: int) -> Table:
    table = Table("scheme", title=title, title_justify="left", box=None, header_style="bold")
    for length in scores[UNPATCHED].by_length:
        table.add_column(f"{length} (trained)" if length == trained else str(length), justify="right")
    for name, result in scores.items():
        table.add_row(name, *(f"{value:.4g}" for value in curve(result).values()))
    return table


def untrained_findings(
    scores: dict[str, PerplexityResult], refused: dict[str, str], trained: int, best: str
) -> list[str]:
    """What the first table says, in words; the words follow the numbers, whatever they are."""
    none, found = curve(scores[UNPATCHED]), curve(scores[best])
    longest = max(none)
    lines = [
        f"{best} is the best at {longest}: {found[longest]:.4g}, unpatched {none[longest]:.4g} "
        f"({_change(none[longest], found[longest])})",
        f"its price at {trained}, where nothing had to change: {none[trained]:.4g} -> {found[trained]:.4g} "
        f"({_change(none[trained], found[trained])})",
    ]
    if ALIBI in scores:
        alibi = curve(scores[ALIBI])[longest]
        verdict = "bad, as it must be" if alibi > none[longest] else "not even bad"
        lines.append(
            f"alibi at {longest}: {alibi:.4g}, {verdict}: the model was trained with rotary positions, and other ones have "
            "to be trained before they are of use"
        )
    return lines + [f"{name} does not fit this model: {reason}" for name, reason in refused.items()]


def finetuned_findings(scores: dict[str, PerplexityResult], trained: int, best: str, tuned: str) -> list[str]:
    none, before, after = (curve(scores[name]) for name in (UNPATCHED, best, tuned))
    longest = max(none)
    return [
        f"fine-tuned at {longest}: {before[longest]:.4g} -> {after[longest]:.4g} "
        f"({_change(before[longest], after[longest])})",
        f"that is {_change(none[trained], after[longest])} against the unpatched model at its trained {trained} "
        f"({none[trained]:.4g})",
        f"the price at {trained} is now {_change(none[trained], after[trained])} "
        f"({none[trained]:.4g} -> {after[trained]:.4g}); part of this is simply more training",
    ]


def _change(before: float, after: float) -> str:
    """
    >>> _change(20.0, 19.0)
    '-5.0 %'
    """
    return f"{100 * (after / before - 1):+.1f} %"
