"""Results as Markdown and CSV."""

from __future__ import annotations

import csv as csv_format
import io
import json
from typing import TYPE_CHECKING, Any

from hfpos.report.grids import grids, perplexity_grid
from hfpos.report.joint import joint_scores, joint_trained_length
from hfpos.report.summary import summary
from hfpos.report.words import in_one_line


if TYPE_CHECKING:
    from hfpos.report.grids import Cell, Grid
    from hfpos.report.results import Comparison, Results, Run

_RUN_COLUMNS = ("comparison", "model", "label", "scheme", "parameters")
_PERPLEXITY_COLUMNS = (
    "length",
    "perplexity",
    "stderr",
    "nll",
    "bits_per_byte",
    "tokens",
    "documents",
    "windows",
)
_RETRIEVAL_COLUMNS = ("task", "length", "depth", "correct", "trials", "accuracy", "low", "high", "chance")


def markdown(results: Results) -> str:
    """All comparisons as Markdown: what was measured, what it says, the tables, and what was left out.

    The best value of each column is bold. Comparisons that were measured alike stand in one table first.
    """
    sections = [_joint(results), *map(_section, results.comparisons)]
    return "\n".join(line for section in sections for line in section)


def csv(results: Results) -> str:
    """Perplexity, one row for each run and context length. Empty where a value was not measured."""
    rows = [
        (*_run_cells(number, comparison, run), length, *(getattr(score, name) for name in _PERPLEXITY_COLUMNS[1:]))
        for number, comparison in enumerate(results.comparisons, 1)
        for run in comparison.runs
        if run.perplexity
        for length, score in sorted(run.perplexity.by_length.items())
    ]
    return _written((*_RUN_COLUMNS, *_PERPLEXITY_COLUMNS), rows)


def retrieval_csv(results: Results) -> str:
    """Retrieval, one row for each run, task, context length and depth; "" if none was measured."""
    rows = [
        (
            *_run_cells(number, comparison, run),
            *(each.task, cell.length, cell.depth, cell.correct, cell.trials, cell.correct / cell.trials),
            *(cell.low, cell.high, each.chance),
        )
        for number, comparison in enumerate(results.comparisons, 1)
        for run in comparison.runs
        for each in run.retrieval
        for cell in each.cells
    ]
    return _written((*_RUN_COLUMNS, *_RETRIEVAL_COLUMNS), rows) if rows else ""


def _run_cells(number: int, comparison: Comparison, run: Run) -> tuple[Any, ...]:
    return number, comparison.model.path, run.label, run.scheme, json.dumps(run.parameters, sort_keys=True)


def _written(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    text = io.StringIO()
    writer = csv_format.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _joint(results: Results) -> list[str]:
    scores = joint_scores(results)
    if not scores:
        return []
    grid = perplexity_grid(scores, joint_trained_length(results))
    return ["## All runs together", "", f"**{_escaped(grid.title)}**", "", *_table(grid), "", _escaped(grid.note), ""]


def _section(comparison: Comparison) -> list[str]:
    lines = [f"## {_escaped(comparison.name)}", "", _escaped(in_one_line(comparison)), ""]
    lines += [f"- {_escaped(sentence)}" for sentence in summary(comparison)]
    for grid in grids(comparison):
        lines += ["", f"**{_escaped(grid.title)}**", "", *_table(grid)]
        lines += ["", _escaped(grid.note)] if grid.note else []
    if comparison.refused:
        lines += ["", "**Could not be applied**", ""]
        lines += [f"- {_escaped(label)}: {_escaped(reason)}" for label, reason in comparison.refused.items()]
    if comparison.skipped:
        lines += ["", "**Documents left out**", ""]
        lines += [f"- {_escaped(each.document)}: {_escaped(each.reason)}" for each in comparison.skipped]
    return [*lines, ""]


def _table(grid: Grid) -> list[str]:
    rows = [
        [_cell(cell, bold=(row, column) in grid.best) for column, cell in enumerate(cells)]
        for row, cells in enumerate(grid.rows)
    ]
    alignment = ["---", *["---:"] * (len(grid.header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (map(_cell, grid.header), alignment, *rows)]


def _cell(cell: Cell, bold: bool = False) -> str:
    text = f"**{_escaped(cell.text)}**" if bold else _escaped(cell.text)
    return f"{text} {_escaped(cell.detail)}".rstrip()


def _escaped(text: str) -> str:
    """Text that ends no table cell and starts no HTML."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
