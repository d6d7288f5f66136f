"""The tables of the conformance sweep as Markdown, and their places in a file, each between two markers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import transformers

from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from hfpos.bench.examine import Row


def replace_part(text: str, name: str, body: str) -> str:
    """`text` with what stands between the markers of `name` replaced by `body`; raises PatchError where the markers are not there.

    >>> replace_part("a\\n<!-- matrix:begin -->\\nold\\n<!-- matrix:end -->\\nb", "matrix", "new")
    'a\\n<!-- matrix:begin -->\\nnew\\n<!-- matrix:end -->\\nb'
    """
    head, begin, rest = text.partition(f"<!-- {name}:begin -->")
    _, end, tail = rest.partition(f"<!-- {name}:end -->")
    if not begin or not end:
        raise PatchError(
            f"no place for the table: expected a line <!-- {name}:begin --> and after it a line <!-- {name}:end -->; add them"
        )
    return f"{head}{begin}\n{body.strip()}\n{end}{tail}"


def part(text: str, name: str) -> str:
    """What stands between the markers of `name`.

    >>> part("a\\n<!-- matrix:begin -->\\nold\\n<!-- matrix:end -->\\nb", "matrix")
    'old'
    """
    return text.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0].strip()


def table(rows: list[Row]) -> str:
    """A summary, one line for every distinct outcome with the model types that share it, and the reasons under it."""
    built = [row for row in rows if not row.problem]
    seams = list(built[0].cells) if built else []
    outcomes: dict[tuple[str, ...], list[str]] = {}
    for row in built:
        outcome = ("yes" if row.rope else "no", *(cell.status for cell in row.cells.values()))
        outcomes.setdefault(outcome, []).append(row.model_type)
    lines = [summary(rows), "", line(["model types", "RoPE", *seams]), line(["---"] * (2 + len(seams)))]
    lines += [line([_names(names), *outcome]) for outcome, names in sorted(outcomes.items(), key=_largest_first)]
    return "\n".join([*lines, "", *(f"- {note}" for note in [*_reasons(built), *_skipped(built), *_missing(rows)])])


def _reasons(rows: list[Row]) -> list[str]:
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    seams: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for seam, cell in row.cells.items():
            if cell.note:
                reasons.setdefault((cell.status, plain(cell.note)), {})[row.model_type] = None
                seams.setdefault((cell.status, plain(cell.note)), {})[f"`{seam}`"] = None
    return [
        f"{', '.join(seams[reason])} {reason[0]}: {reason[1]}: {_names(names)}"
        for reason, names in sorted(reasons.items(), key=_largest_first)
    ]


def _skipped(rows: list[Row]) -> list[str]:
    skipped: dict[str, list[str]] = {}
    for row in rows:
        if any(cell.status == "works" for cell in row.cells.values()):
            for probe in row.skipped:
                skipped.setdefault(probe, []).append(row.model_type)
    return [
        f"not held against a patch, as the unpatched model fails it too: {probe} of {_names(names)}"
        for probe, names in skipped.items()
    ]


def _missing(rows: list[Row]) -> list[str]:
    return [f"could not be built small: {row.model_type}: {plain(row.problem)}" for row in rows if row.problem]


def _largest_first(group: tuple[object, Collection[str]]) -> int:
    return -len(group[1])


def _names(names: Collection[str]) -> str:
    return f"{', '.join(names)} ({len(names)})"


def summary(rows: list[Row]) -> str:
    """How many classes were built, and on how many of them the seams work."""
    built = [row for row in rows if not row.problem]
    rope = [row for row in built if row.rope]
    failures = sum(cell.status == "fails" for row in built for cell in row.cells.values())
    return (
        f"Transformers {transformers.__version__}: {len(built)} of {len(rows)} causal language model classes, "
        f"{len(rope)} of them with RoPE. `freq` works on {_share(rope, 'freq')} of those with RoPE, "
        f"`bias` on {_share(built, 'bias')} of all. Failures: {failures}."
    )


def _share(rows: list[Row], seam: str) -> str:
    works = sum(row.cells[seam].status == "works" for row in rows)
    return f"{works}/{len(rows)} ({100 * works / max(len(rows), 1):.0f} %)"


def plain(note: str, limit: int = 200) -> str:
    """A message without the name of the one class it is about, so that equal reasons are one, and fit for Markdown."""
    note = re.sub(r"\b\w+(?=RotaryEmbedding|Attention|For[A-Z]|LMHeadModel|Model|Decoder|Stack)\w+", "the model", note)
    note = note.replace("|", "/").replace("<", "&lt;")
    return note if len(note) <= limit else f"{note[: limit - 3]}..."


def line(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
