"""What a comparison says, in sentences. The words follow the numbers, whatever these are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hfpos.evaluate.retrieval import wilson
from hfpos.report.gate import Change, Trade, problem_with_trades, trades
from hfpos.report.grids import pooled
from hfpos.report.numbers import number, percent, share
from hfpos.report.words import counted, listed


if TYPE_CHECKING:
    from hfpos.evaluate.result import PerplexityResult
    from hfpos.report.results import Comparison

_FEW = 5  # more schemes than this are not told one by one


def summary(comparison: Comparison) -> list[str]:
    """Which scheme does best, how far each holds, what it costs, and what to be careful with: one sentence or a few each."""
    lines = []
    if comparison.scores:
        lines += [_best(comparison), _closeness(comparison), _reach(comparison), _cost(comparison)]
    else:
        lines.append("No perplexity was measured.")
    lines += [_retrieval(comparison, task) for task in _tasks(comparison)]
    return [line for line in (*lines, _untrained(comparison), _left_out(comparison), *_cautions(comparison)) if line]


def _best(comparison: Comparison) -> str:
    longest, found = comparison.lengths[-1], _at_longest(comparison)
    reference = comparison.runs[0].label
    where = f"At {longest:,} tokens{_times(comparison, longest)}"
    if len(comparison.runs) == 1:
        tried = "No scheme could be applied. " if comparison.refused else "No other scheme was measured. "
        return f"{tried}{where}, {_name(comparison, reference)} has a perplexity of {number(found[reference])}."
    if not any(map(math.isfinite, found.values())):
        return f"{where}, the perplexity of every run is too large to be a number: nothing works there."
    best = min(found, key=lambda label: (not math.isfinite(found[label]), found[label]))
    if reference not in found:
        return f"{where}, {best} has the lowest perplexity, {number(found[best])}; {reference} was not measured there."
    if best != reference:
        change = Change(longest, before=found[reference], after=found[best])
        return (
            f"{where}, {best} does best: a perplexity of {number(found[best])}, against {number(found[reference])} for "
            f"{_name(comparison, reference)} ({percent(change.relative)})."
        )
    others = {label: value for label, value in found.items() if label != reference}
    if not others:
        return f"{where}, only {_name(comparison, reference)} was measured: a perplexity of {number(found[best])}."
    nearest = min(others, key=lambda label: others[label])
    change = Change(longest, before=found[best], after=others[nearest])
    return (
        f"{where}, no scheme helps: {_name(comparison, reference)} does best, with a perplexity of {number(found[best])}. "
        f"The nearest scheme is {nearest} with {number(others[nearest])} ({percent(change.relative)})."
    )


def _closeness(comparison: Comparison) -> str:
    """A warning where the two best are less than their standard errors apart."""
    longest = comparison.lengths[-1]
    scores = [
        (score.perplexity, score.stderr, label)
        for label, result in comparison.scores.items()
        if (score := result.by_length.get(longest)) and score.stderr is not None
    ]
    if len(scores) < 2:
        return ""
    (first, first_error, best), (second, second_error, next_best) = sorted(scores)[:2]
    if second - first >= math.hypot(first_error, second_error):
        return ""
    return (
        f"{best} and {next_best} are less than their standard errors apart there ({number(first)} and {number(second)}): "
        "do not read much into their order."
    )


def _reach(comparison: Comparison) -> str:
    """Up to which length more context does no harm, the runs that reach equally far together."""
    lengths = comparison.lengths
    by_reach: dict[int, list[str]] = {}
    if len(lengths) == 1:
        return f"Only one length was measured, {lengths[0]:,} tokens, so nothing can be said about how far a scheme holds."
    for label, result in comparison.scores.items():
        by_reach.setdefault(result.effective_context(comparison.protocol.tolerance), []).append(label)
    parts = []
    for length, labels in sorted(by_reach.items(), reverse=True):
        note = (
            ", the longest measured"
            if length == lengths[-1]
            else ", the shortest measured"
            if length == lengths[0]
            else ""
        )
        parts.append(f"{listed(labels)} up to {length:,} tokens{note}")
    return (
        f"More context does no harm (perplexity within {share(comparison.protocol.tolerance)} of the best at a shorter "
        f"length) under {'; '.join(parts)}."
    )


def _cost(comparison: Comparison) -> str:
    problem = problem_with_trades(comparison)
    if problem:
        return f"There is no cost at short context to be told: {problem}."
    found = sorted(trades(comparison), key=lambda trade: trade.cost)
    if not found:
        return ""
    worse = [trade for trade in found if trade.cost >= 0.0005]  # what `percent` shows as more than nothing
    free = [trade.label for trade in found if trade.cost < 0.0005]
    where = f"Up to the trained {comparison.model.trained_length:,} tokens, where the model needs no help,"
    parts = [f"{listed(free)} {'costs' if len(free) == 1 else 'cost'} nothing"] if free else []
    if len(worse) > _FEW:
        parts.append(f"perplexity {_price(worse[0])} at the least, and {_price(worse[-1])} at the most")
    elif worse:
        parts.append(f"perplexity {listed([_price(trade) for trade in worse])}")
    return f"{where} {', but '.join(parts)}."


def _price(trade: Trade) -> str:
    """How much worse: in percent, or in times where percent would be large.

    >>> _price(Trade("yarn", Change(128, 20.0, 22.0), Change(512, 40.0, 21.0)))
    'rises by 10.0 % under yarn (20.00 to 22.00 at 128)'
    """
    change = trade.short
    by = (
        f"rises by {percent(trade.cost).lstrip('+')}"
        if trade.cost < 2
        else f"is {number(trade.cost + 1, 3)} times as high"
    )
    return f"{by} under {trade.label} ({number(change.before)} to {number(change.after)} at {change.length:,})"


def _tasks(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(each.task for run in comparison.runs for each in run.retrieval))


def _retrieval(comparison: Comparison, task: str) -> str:
    results = {run.label: each for run in comparison.runs for each in run.retrieval if each.task == task}
    longest = max(cell.length for result in results.values() for cell in result.cells)
    found = {
        label: pooled(result, longest)
        for label, result in results.items()
        if any(cell.length == longest for cell in result.cells)
    }
    found = dict(sorted(found.items(), key=lambda item: -item[1][0] / item[1][1]))
    best, chance = next(iter(found)), next(iter(results.values())).chance
    parts = [f"{label} finds {share(right / trials)}" for label, (right, trials) in found.items()]
    text = f"Retrieval ({task}) at {longest:,} tokens: {listed(parts)}; guessing finds {share(chance)}."
    if wilson(*found[best])[0] <= chance:
        text += " None is surely better than guessing."
    return text


def _untrained(comparison: Comparison) -> str:
    labels = [run.label for run in comparison.runs if run.needs_training]
    if not labels:
        return ""
    return (
        f"{listed(labels)} {'replaces' if len(labels) == 1 else 'replace'} the positions that the model was trained with by "
        "positions of another kind: these numbers show the model before it was trained with them, not what the scheme is "
        "worth."
    )


def _left_out(comparison: Comparison) -> str:
    if len(comparison.runs) == 1 or not comparison.refused:
        return ""
    return f"{listed(list(comparison.refused))} could not be applied to this model; the reasons are below."


def _cautions(comparison: Comparison) -> list[str]:
    found = []
    documents = [_documents(result) for result in comparison.scores.values()]
    if documents and max(max(each.values()) for each in documents) == 1:
        found.append(
            "All this was measured on a single document, so nothing tells how far the numbers would differ on another one."
        )
    if any(len(set(each.values())) > 1 for each in documents):
        shortest, longest = min(documents[0]), max(documents[0])
        found.append(
            f"Not all documents are long enough for every length ({counted(documents[0][shortest], 'document')} at "
            f"{shortest:,} tokens, {documents[0][longest]:,} at {longest:,}): compare schemes at one length rather than one "
            "scheme at two lengths."
        )
    if comparison.skipped:
        found.append(f"{counted(len(comparison.skipped), 'document')} could not be used; the reasons are below.")
    return found


def _documents(result: PerplexityResult) -> dict[int, int]:
    return {length: score.documents for length, score in result.by_length.items()}


def _at_longest(comparison: Comparison) -> dict[str, float]:
    longest = comparison.lengths[-1]
    return {
        label: result.by_length[longest].perplexity
        for label, result in comparison.scores.items()
        if longest in result.by_length
    }


def _times(comparison: Comparison, length: int) -> str:
    trained = comparison.model.trained_length
    if not trained:
        return ""
    return (
        f" ({length / trained:.3g} times the {trained:,} it was trained at)" if length != trained else " (as trained)"
    )


def _name(comparison: Comparison, label: str) -> str:
    run = next(run for run in comparison.runs if run.label == label)
    return f"the model as it was loaded ({label})" if run.scheme == "none" else label
