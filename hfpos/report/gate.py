"""The short-context gate: what a scheme costs at the lengths the model was trained for, beside what it gains beyond them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfpos.report.numbers import number, percent
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from hfpos.evaluate.result import PerplexityResult
    from hfpos.report.results import Comparison


@dataclass(frozen=True)
class Change:
    """A perplexity at one length, in the reference run and under a scheme."""

    length: int
    before: float
    after: float

    @property
    def relative(self) -> float:
        """0.1 where the scheme's perplexity is 10 % higher, i.e. worse; negative where it is better.

        >>> round(Change(128, before=20.0, after=22.0).relative, 6)
        0.1
        """
        return 0.0 if self.before == self.after else self.after / self.before - 1

    def __str__(self) -> str:
        return f"{number(self.before, 3)} -> {number(self.after, 3)} ({percent(self.relative)}) at {self.length:,}"


@dataclass(frozen=True)
class Trade:
    """What one run costs and gains against the first run of its comparison.

    Attributes:
        label: of the run.
        short: the worst change of all measured lengths up to the trained one.
        long: the change at the longest length measured.
    """

    label: str
    short: Change
    long: Change

    @property
    def cost(self) -> float:
        """Relative rise of perplexity at `short`; positive is worse."""
        return self.short.relative

    @property
    def gain(self) -> float:
        """Relative fall of perplexity at `long`; positive is better."""
        return -self.long.relative

    def __str__(self) -> str:
        return f"{self.label}: {self.short} tokens, {self.long}"


def trades(comparison: Comparison) -> tuple[Trade, ...]:
    """Cost and gain of every run but the first, which is what the others are compared with.

    Raises:
        PatchError: no perplexity, no trained length, or no length measured up to it; the message says what to pass.
    """
    problem = problem_with_trades(comparison)
    if problem:
        raise PatchError(problem)
    trained = comparison.model.trained_length or 0
    reference, *others = comparison.scores.items()
    return tuple(_trade(label, reference[1], result, trained) for label, result in others)


def regressions(comparison: Comparison, allowed: float) -> tuple[Trade, ...]:
    """The trades whose cost is above `allowed` (0.01 is 1 %).

    Raises:
        PatchError: as `trades`, or `allowed` is not a number from 0 on.
    """
    if not allowed >= 0:
        raise PatchError(f"allowed={allowed}: expected a share of 0 or more, e.g. 0.01 for 1 %")
    return tuple(trade for trade in trades(comparison) if not trade.cost <= allowed)


def problem_with_trades(comparison: Comparison) -> str:
    """Why there is no cost to be told for this comparison; "" where there is."""
    trained = comparison.model.trained_length
    if comparison.runs[0].label not in comparison.scores:
        return f"no perplexity of {comparison.runs[0].label} was measured, so no cost can be told; measure it too"
    if trained is None:
        return (
            f"{comparison.name} does not state its trained length, so the cost at short context cannot be told; pass it "
            "with original_length"
        )
    if comparison.lengths[0] > trained:
        return (
            f"no length up to the trained {trained:,} tokens was measured (the shortest: {comparison.lengths[0]:,}), so the "
            f"cost at short context cannot be told; add {trained} to the lengths"
        )
    reference = comparison.scores[comparison.runs[0].label]
    for label, result in comparison.scores.items():
        if not any(length <= trained for length in _common(reference, result)):
            return (
                f"{label} and {comparison.runs[0].label} have no length up to the trained {trained:,} tokens in common, so no "
                "cost can be told; measure both at the same lengths"
            )
    return ""


def _common(reference: PerplexityResult, result: PerplexityResult) -> list[int]:
    """The lengths at which both were measured."""
    return sorted(reference.by_length.keys() & result.by_length.keys())


def _trade(label: str, reference: PerplexityResult, result: PerplexityResult, trained: int) -> Trade:
    changes = [
        Change(length, reference.by_length[length].perplexity, result.by_length[length].perplexity)
        for length in _common(reference, result)
    ]
    short = max((change for change in changes if change.length <= trained), key=_badness)
    return Trade(label, short, changes[-1])


def _badness(change: Change) -> float:
    return math.inf if math.isnan(change.relative) else change.relative
