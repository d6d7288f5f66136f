"""The matrix of all schemes and the models they were tried on, as Markdown: schemes with equal outcomes share a line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import transformers

from hfpos.bench.matrix import line, plain
from hfpos.families import REGISTRY


if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfpos.bench.examine import Cell, Row


def pairs_table(rows: list[Row]) -> str:
    """A summary, one line for schemes that the same models take, and why the others refuse."""
    built = [row for row in rows if not row.problem]
    models = [row.model_type for row in built]
    cells = [(label, row.model_type, cell) for row in built for label, cell in row.cells.items()]
    lines = [_summary(models, [cell for *_, cell in cells]), ""]
    lines += [line(("schemes", "work on", "but not on")), line(["---"] * 3)]
    outcomes: dict[tuple[str, ...], list[str]] = {}
    for label in dict.fromkeys(label for label, *_ in cells):
        others = tuple(model for each, model, cell in cells if each == label and cell.status != "works")
        outcomes.setdefault(others, []).append(label)
    for others, labels in sorted(outcomes.items(), key=lambda item: (len(item[0]), -len(item[1]))):
        lines.append(line((_code(labels), *_divided(models, others))))
    notes = [*_reasons(models, cells), *_problems(rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def _divided(models: list[str], others: tuple[str, ...]) -> tuple[str, str]:
    """How many models a scheme works on, and the names of those that it does not work on, or else of those that it does.

    >>> _divided(["llama", "t5", "bert"], ("bert",)), _divided(["llama", "t5", "bert"], ("llama", "bert"))
    (('2 of 3', 'bert'), ('1 of 3: t5', 'all others'))
    """
    if not others:
        return "all", ""
    works = [model for model in models if model not in others]
    count = f"{len(works)} of {len(models)}"
    return (count, ", ".join(others)) if len(others) <= len(works) else (f"{count}: {', '.join(works)}", "all others")


def _summary(models: list[str], cells: list[Cell]) -> str:
    counts = {status: sum(cell.status == status for cell in cells) for status in ("works", "refused", "fails")}
    return (
        f"Transformers {transformers.__version__}, {len(models)} models ({', '.join(models)}): of {len(cells)} pairs with a scheme "
        f"{counts['works']} work and {counts['refused']} are refused with a reason. Failures: {counts['fails']}."
    )


def _reasons(built: list[str], cells: list[tuple[str, str, Cell]]) -> list[str]:
    """Each reason with the schemes and the models it is given for, exactly those."""
    models: dict[tuple[str, str], dict[str, list[str]]] = {}
    for label, model, cell in cells:
        if cell.note:
            reason = cell.status, plain(_without_name(cell.note, label.partition(",")[0]), limit=400)
            models.setdefault(reason, {}).setdefault(label, []).append(model)
    grouped: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (status, note), by_label in models.items():
        for label, names in by_label.items():
            grouped.setdefault((status, note, tuple(names)), []).append(label)
    ordered = sorted(grouped.items(), key=lambda item: -len(item[0][2]) * len(item[1]))
    return [f"{_code(labels)} {status} by {_these(built, names)}: {note}" for (status, note, names), labels in ordered]


def _these(models: list[str], names: tuple[str, ...]) -> str:
    """The names, or those that are missing where they are fewer.

    >>> _these(["llama", "t5", "bert"], ("llama", "bert"))
    'all but t5'
    """
    missing = [model for model in models if model not in names]
    return ", ".join(names) if len(names) <= len(missing) else " but ".join(filter(None, ("all", ", ".join(missing))))


def _problems(rows: list[Row]) -> list[str]:
    return [f"could not be built small: {row.model_type}: {plain(row.problem)}" for row in rows if row.problem]


def _without_name(note: str, scheme: str) -> str:
    """The note without the names of the one scheme and the one family it is about, so that equal reasons are one.

    >>> _without_name("'linear' acts at the 'freq' seam; bert (BertModel) has none", "linear")
    "it acts at the 'freq' seam; BertModel has none"
    >>> _without_name("linear(a=f(1), b=2) did nothing", "linear")
    'it did nothing'
    """
    note = re.sub(rf"'{scheme}'|\b{scheme}\((?:[^()]|\([^()]*\))*\)|^{scheme}(?=:)", "it", note)
    return re.sub(rf"\b({'|'.join(REGISTRY.as_dict())}) \((\w+)\)", r"\2", note)


def _code(labels: Iterable[str]) -> str:
    """
    >>> _code(["yarn", "dynamic, exact"])
    '`yarn`, `dynamic` (exact)'
    """
    names = (label.partition(", ") for label in labels)
    return ", ".join(f"`{name}`" + (f" ({kind})" if kind else "") for name, _, kind in names)
