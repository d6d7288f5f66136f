"""What the retrieval tests have in common: a grid of context length x depth, accuracy with an interval."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from hfpos.evaluate.arguments import check_lengths
from hfpos.evaluate.processes import gather, is_main, share
from hfpos.patching import afresh
from hfpos.probe import eval_mode
from hfpos.scheme import PatchError


DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class RetrievalCell:
    """Accuracy at one context length (tokens) and depth (0: the start of the context, 1: its end).

    Attributes:
        length: tokens of prompt and generation together, exactly.
        depth: where the fact stands, as a share of the context.
        correct: how much was found: trials, or for several needles the needles.
        trials: how much was to be found.
        low, high: Wilson interval of correct / trials at 95 %.
    """

    length: int
    depth: float
    correct: int
    trials: int
    low: float
    high: float


@dataclass(frozen=True)
class RetrievalResult:
    """One retrieval test of one model; `str()` is a table of accuracies.

    Attributes:
        task: `passkey`, `needle` or `key_value`.
        chance: the accuracy of guessing.
        settings: what the test was run with: seed, trials, generated tokens and the like.
        cells: one for each length and depth.
    """

    task: str
    chance: float
    settings: dict[str, int | float | str]
    cells: tuple[RetrievalCell, ...]

    @property
    def accuracy(self) -> float:
        """What was found of all that was to be found."""
        return _share(self.cells)

    def accuracy_at(self, length: int) -> float:
        """The same at one context length, over all depths."""
        return _share([cell for cell in self.cells if cell.length == length])

    def __str__(self) -> str:
        depths = sorted({cell.depth for cell in self.cells})
        share = {(cell.length, cell.depth): cell.correct / cell.trials for cell in self.cells}
        lines = [f"{self.task}: accuracy by length (rows) and depth (columns)"]
        lines.append(f"{'length':>8} " + " ".join(f"{depth:>6.4g}" for depth in depths) + "    all")
        for length in sorted({cell.length for cell in self.cells}):
            found = [share[length, depth] for depth in depths] + [self.accuracy_at(length)]
            lines.append(f"{length:>8} " + " ".join(f"{each:>6.2f}" for each in found))
        low, high = wilson(sum(cell.correct for cell in self.cells), sum(cell.trials for cell in self.cells))
        lines.append(
            f"overall {self.accuracy:.3f} ({low:.3f} to {high:.3f} at 95 %); guessing finds {self.chance:.3g}"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Job:
    """One trial of a grid."""

    length: int
    depth: float
    trial: int

    def random(self, seed: int) -> random.Random:
        """This job's own random numbers, the same whatever else is in its grid."""
        return random.Random(f"{seed} {self.length} {self.depth} {self.trial}")

    def __str__(self) -> str:
        return f"length {self.length}, depth {self.depth:g}, trial {self.trial}"


# A test runs a few jobs of the same length together and returns, for each, how much it found and how much there was to find.
Score = Callable[[list[Job]], list[tuple[int, int]]]


def grid(lengths: Sequence[int], depths: Sequence[float], trials: int) -> list[Job]:
    """All jobs of a test, shortest first. Raises `PatchError` for what is no length, depth or number of trials."""
    sizes = check_lengths(lengths)
    shares = list(depths)
    if not shares or any(isinstance(each, (bool, str)) or not 0 <= each <= 1 for each in shares):
        raise PatchError(
            f"depths={depths!r}: expected numbers from 0 (the start of the context) to 1 (its end), e.g. depths=[0, 0.5, 1]"
        )
    check_count("trials", trials, least=1)
    return [
        Job(size, depth, trial)
        for size in sizes
        for depth in sorted(set(map(float, shares)))
        for trial in range(trials)
    ]


def check_count(name: str, value: object, least: int) -> None:
    """Raise `PatchError` unless the argument `name` is a whole number of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PatchError(f"{name}={value!r}: expected a whole number of {least} or more")


def run_grid(
    task: str,
    model: nn.Module,
    jobs: list[Job],
    score: Score,
    *,
    chance: float,
    settings: dict[str, int | float | str],
    batch_tokens: int = 1,
    progress: bool = False,
) -> RetrievalResult:
    """Run all jobs in eval mode, about `batch_tokens` tokens at a time, and count what was found in each cell."""
    found: dict[tuple[int, float], tuple[int, int]] = {}
    for job, (correct, asked) in _outcomes(task, model, jobs, score, batch_tokens, progress):
        before = found.get((job.length, job.depth), (0, 0))
        found[job.length, job.depth] = (before[0] + correct, before[1] + asked)
    cells = [
        RetrievalCell(length, depth, correct, asked, *wilson(correct, asked))
        for (length, depth), (correct, asked) in sorted(found.items())
    ]
    return RetrievalResult(task, chance, settings, tuple(cells))


def _outcomes(
    task: str, model: nn.Module, jobs: list[Job], score: Score, batch_tokens: int, progress: bool
) -> list[tuple[Job, tuple[int, int]]]:
    """Run this process's share of the batches; the outcomes of all processes."""
    process, processes = share(model)
    batches = list(_batches(jobs, batch_tokens))[process::processes]
    mine: list[tuple[Job, tuple[int, int]]] = []
    error = None
    bar = Progress(console=Console(stderr=True), disable=not (progress and is_main()))
    try:
        with eval_mode(model), torch.no_grad(), bar:
            shown = bar.add_task(task, total=sum(job.length for batch in batches for job in batch))
            for batch in batches:
                with afresh(model):
                    mine += zip(batch, score(batch), strict=True)
                bar.advance(shown, sum(job.length for job in batch))
    except PatchError as caught:
        error = caught
    return gather(mine, error, processes)


def wilson(correct: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (E. B. Wilson 1927), at 95 % unless another `z` is given.

    >>> [round(bound, 4) for bound in wilson(8, 10)]
    [0.4902, 0.9433]
    >>> wilson(0, 10)[0], wilson(10, 10)[1]
    (0.0, 1.0)
    """
    share, spread = correct / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # exactly 0 and 1 at the ends, where rounding may miss them
    return (max(0.0, centre - half) if correct else 0.0), (min(1.0, centre + half) if correct < trials else 1.0)


def _batches(jobs: list[Job], batch_tokens: int) -> Iterator[list[Job]]:
    """Jobs of the same length, so that no batch needs padding."""
    for length, group in groupby(jobs, key=lambda job: job.length):
        alike, size = list(group), max(1, batch_tokens // length)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _share(cells: Sequence[RetrievalCell]) -> float:
    return sum(cell.correct for cell in cells) / sum(cell.trials for cell in cells)
