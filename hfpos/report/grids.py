"""The tables of a report as plain text cells, before they become Markdown or HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hfpos.report.gate import problem_with_trades, trades
from hfpos.report.numbers import number, percent, share


if TYPE_CHECKING:
    from collections.abc import Mapping

    from hfpos.evaluate.result import LengthScore, PerplexityResult
    from hfpos.evaluate.retrieval import RetrievalResult
    from hfpos.report.results import Comparison


class Cell(NamedTuple):
    """The text of a cell, and what may stand smaller beside or under it."""

    text: str
    detail: str = ""


NOT_MEASURED = Cell("-")


@dataclass(frozen=True)
class Grid:
    """A table: the first column names the row, the others are numbers.

    Attributes:
        title: what it shows.
        header: one cell a column.
        rows: the cells, the first of each row its name.
        best: (row, column) of the best cells.
        note: what a reader has to know to read it.
    """

    title: str
    header: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    note: str = ""


def grids(comparison: Comparison) -> list[Grid]:
    """All tables of one comparison, those without a number left out."""
    found = []
    if comparison.scores:
        found += [perplexity_grid(comparison.scores, comparison.model.trained_length), *_bits_grid(comparison)]
        found.append(_trade_grid(comparison))
    tasks = dict.fromkeys(each.task for run in comparison.runs for each in run.retrieval)
    return found + [_retrieval_grid(comparison, task) for task in tasks]


def perplexity_grid(scores: Mapping[str, PerplexityResult], trained: int | None) -> Grid:
    """Perplexity, a row for each label and a column for each context length."""
    with_error = any(score.stderr is not None for result in scores.values() for score in result.by_length.values())
    return _by_length(
        "Perplexity by context length in tokens (lower is better)",
        {
            label: {length: score.perplexity for length, score in each.by_length.items()}
            for label, each in scores.items()
        },
        {
            label: {length: _perplexity(score) for length, score in each.by_length.items()}
            for label, each in scores.items()
        },
        trained,
        "± is the standard error over documents." if with_error else "",
    )


def _bits_grid(comparison: Comparison) -> list[Grid]:
    bits = {
        label: {
            length: score.bits_per_byte for length, score in each.by_length.items() if score.bits_per_byte is not None
        }
        for label, each in comparison.scores.items()
    }
    if not any(bits.values()):
        return []
    return [
        _by_length(
            "Bits per byte of text (lower is better; can be compared between tokenizers)",
            bits,
            {label: {length: Cell(f"{value:.4f}") for length, value in row.items()} for label, row in bits.items()},
            comparison.model.trained_length,
        )
    ]


def _retrieval_grid(comparison: Comparison, task: str) -> Grid:
    results = {run.label: each for run in comparison.runs for each in run.retrieval if each.task == task}
    found = {
        label: {length: pooled(result, length) for length in sorted({cell.length for cell in result.cells})}
        for label, result in results.items()
    }
    return _by_length(
        f"Retrieval, {task}: found, by context length in tokens (higher is better)",
        {label: {length: -right / trials for length, (right, trials) in row.items()} for label, row in found.items()},
        {
            label: {
                length: Cell(share(right / trials), f"({right}/{trials})") for length, (right, trials) in row.items()
            }
            for label, row in found.items()
        },
        comparison.model.trained_length,
        f"Over all depths. Guessing finds {share(next(iter(results.values())).chance)}.",
    )


def _trade_grid(comparison: Comparison) -> Grid:
    problem, tolerance = problem_with_trades(comparison), comparison.protocol.tolerance
    traded = {} if problem else {trade.label: trade for trade in trades(comparison)}
    note = (
        f"Effective context: the longest length whose perplexity stays within {share(tolerance)} of the best at a shorter "
        "one. It says up to where more context does no harm, not how good the predictions are."
    )
    header = [Cell("scheme"), Cell("effective context")]
    if traded:
        header += [Cell("worst change up to the trained length"), Cell(f"change at {comparison.lengths[-1]:,}")]
        note += f" The changes are against {comparison.runs[0].label}: below zero is better, above zero is worse."
    elif problem:
        note += f" No cost: {problem}."
    trained, longest = comparison.model.trained_length, comparison.lengths[-1]
    beyond = trained is not None and any(_reaches(result, trained, longest) for result in comparison.scores.values())
    if beyond:
        header.insert(2, Cell("perplexity of the tokens beyond the trained length"))
        note += f" Beyond the trained length: tokens with {trained:,} tokens or more before them in windows of {longest:,}."
    rows = []
    for label, result in comparison.scores.items():
        row = [Cell(label), Cell(f"{result.effective_context(tolerance):,}")]
        if beyond:
            row.append(_beyond(result, trained or 0, longest))
        if label in traded:
            trade = traded[label]
            row += [Cell(percent(trade.cost), f"(at {trade.short.length:,})"), Cell(percent(trade.long.relative))]
        elif traded:
            row += [NOT_MEASURED, NOT_MEASURED]
        rows.append(tuple(row))
    return Grid("How far it holds, what it costs and what it gains", tuple(header), tuple(rows), note=note)


def _reaches(result: PerplexityResult, trained: int, longest: int) -> bool:
    """Whether the loss at the longest length is known apart from the trained length on."""
    score = result.by_length.get(longest)
    return score is not None and any(bucket.start == trained for bucket in score.curve)


def _beyond(result: PerplexityResult, trained: int, longest: int) -> Cell:
    if not _reaches(result, trained, longest):
        return NOT_MEASURED
    return Cell(number(result.by_length[longest].perplexity_between(trained, longest)))


def pooled(result: RetrievalResult, length: int) -> tuple[int, int]:
    """(found, to be found) over all depths at one length."""
    cells = [cell for cell in result.cells if cell.length == length]
    return sum(cell.correct for cell in cells), sum(cell.trials for cell in cells)


def _perplexity(score: LengthScore) -> Cell:
    return Cell(number(score.perplexity), "" if score.stderr is None else f"± {number(score.stderr, 2)}")


def _by_length(
    title: str,
    values: Mapping[str, Mapping[int, float]],
    cells: Mapping[str, Mapping[int, Cell]],
    trained: int | None,
    note: str = "",
) -> Grid:
    """A table with a row for each label and a column for each length; the lowest value of a column is the best, unless all are equal."""
    lengths = sorted({length for row in cells.values() for length in row})
    columns = {length: [row.get(length, math.inf) for row in values.values()] for length in lengths}
    lowest = {length: min(column) if len(set(column)) > 1 else math.inf for length, column in columns.items()}
    best = {
        (number, column)
        for number, row in enumerate(values.values())
        for column, length in enumerate(lengths, 1)
        if math.isfinite(lowest[length]) and row.get(length) == lowest[length]
    }
    return Grid(
        title,
        (Cell("scheme"), *(Cell(f"{length:,}", "(trained)" if length == trained else "") for length in lengths)),
        tuple((Cell(label), *(row.get(length, NOT_MEASURED) for length in lengths)) for label, row in cells.items()),
        frozenset(best),
        note,
    )
