"""Several comparisons side by side: what each is called there, and the numbers that can stand in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeVar

from hfpos.report.words import differences


if TYPE_CHECKING:
    from collections.abc import Mapping

    from hfpos.evaluate.attention_profile import AttentionProfile
    from hfpos.evaluate.result import PerplexityResult
    from hfpos.report.results import Comparison, Results

T = TypeVar("T")


def distinct_names(paths: Sequence[str]) -> list[str]:
    """What tells some paths or hub names apart: their parts but those that all begin or end with; numbered where that is not enough.

    >>> distinct_names(["runs/alibi/model", "runs/rope/model"])
    ['alibi', 'rope']
    >>> distinct_names(["mine/base", "mine/base"])
    ['1 base', '2 base']
    """
    parts = [PurePath(path).parts for path in paths]
    shared_start = _shared(parts)
    rest = [each[shared_start:] for each in parts]
    shared_end = _shared([each[::-1] for each in rest])
    names = ["/".join(each[: len(each) - shared_end]) for each in rest]
    if all(names) and len(set(names)) == len(names):
        return names
    return [f"{number} {each[-1]}" for number, each in enumerate(parts, 1)]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many parts all have in common at their beginning."""
    alike = [len(set(level)) == 1 for level in zip(*parts, strict=False)]
    return alike.index(False) if False in alike else len(alike)


def joint_scores(results: Results) -> dict[str, PerplexityResult]:
    """The perplexity of all runs by `comparison: label`, where all comparisons were measured alike; else none.

    Comparisons of a single run each, as of several models, are told apart by their names alone.
    """
    return _side_by_side(results, {id(each): each.scores for each in results.comparisons})


def joint_profiles(results: Results) -> dict[str, AttentionProfile]:
    """Where attention looks, of all runs by the same labels."""
    return _side_by_side(results, {id(each): each.profiles for each in results.comparisons})


def joint_trained_length(results: Results) -> int | None:
    """The trained length that all comparisons share, if they do."""
    found = {comparison.model.trained_length for comparison in results.comparisons}
    return found.pop() if len(found) == 1 else None


def _side_by_side(results: Results, found: Mapping[int, Mapping[str, T]]) -> dict[str, T]:
    comparisons = results.comparisons
    if len(comparisons) < 2 or differences(comparisons):
        return {}
    alone = all(len(comparison.runs) == 1 for comparison in comparisons)
    return {
        name if alone else f"{name}: {label}": value
        for name, comparison in zip(_names(comparisons), comparisons, strict=True)
        for label, value in found[id(comparison)].items()
    }


def _names(comparisons: Sequence[Comparison]) -> list[str]:
    names = [comparison.name for comparison in comparisons]
    return names if len(set(names)) == len(names) else [f"{number} {name}" for number, name in enumerate(names, 1)]
