"""From the losses of tokens to the score of a context length: sums by document, so that they add up in any order and on any process."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from hfpos.evaluate.result import Bucket, LengthScore


BUCKETS = 32
RESAMPLES = 1000


def bucket_edges(length: int, marks: list[int]) -> list[int]:
    """Positions at which the loss curve of a context length is divided: about 32 equal parts, and also at each of `marks`.

    >>> bucket_edges(8, marks=[3, 100])
    [1, 2, 3, 4, 5, 6, 7, 8]
    """
    even = {round(length * part / BUCKETS) for part in range(1, BUCKETS + 1)}
    return sorted({1, length} | {edge for edge in even | set(marks) if 1 < edge < length})


@dataclass
class Tally:
    """The sums of one document at one context length, in nats.

    Attributes:
        nll: sum of negative log-likelihoods.
        tokens: scored.
        windows: read.
        window_means: sum over the windows of their mean loss.
        bytes: of the text that the scored tokens stand for; None where that is not known.
        curve: for each bucket, the sum of losses and the number of tokens.
    """

    nll: float = 0.0
    tokens: int = 0
    windows: int = 0
    window_means: float = 0.0
    bytes: int | None = 0
    curve: list[list[float]] = field(default_factory=list)

    def add(self, losses: torch.Tensor, first_position: int, edges: list[int], size: int | None) -> None:
        """Add one window: the losses (n,) float64 of consecutive tokens, the first of which has `first_position` tokens before it.

        Args:
            edges: of the curve's buckets, from `bucket_edges`.
            size: bytes of these tokens, if known.
        """
        total = losses.sum().item()
        self.nll += total
        self.tokens += len(losses)
        self.windows += 1
        self.window_means += total / len(losses)
        self.bytes = None if self.bytes is None or size is None else self.bytes + size
        if not self.curve:
            self.curve = [[0.0, 0] for _ in edges[1:]]
        sums = torch.cat((losses.new_zeros(1), losses.cumsum(0)))
        for bucket, (start, stop) in zip(self.curve, zip(edges[:-1], edges[1:], strict=True), strict=True):
            low, high = (min(max(edge - first_position, 0), len(losses)) for edge in (start, stop))
            bucket[0] += (sums[high] - sums[low]).item()
            bucket[1] += high - low


def score(tallies: list[Tally], edges: list[int], aggregate: Literal["tokens", "windows"], seed: int) -> LengthScore:
    """The score of one context length over documents.

    Args:
        tallies: one a document, at least one.
        edges: of the curve's buckets.
        aggregate: "tokens" weighs each token alike, "windows" each window.
        seed: of the bootstrap.
    """
    weigh_tokens = aggregate == "tokens"
    sums = np.array([each.nll if weigh_tokens else each.window_means for each in tallies])
    counts = np.array([each.tokens if weigh_tokens else each.windows for each in tallies])
    nll = math.fsum(sums) / int(counts.sum())
    tokens = sum(each.tokens for each in tallies)
    known = [each.bytes for each in tallies if each.bytes is not None]
    size: int = sum(known) if len(known) == len(tallies) else 0
    inside = [sum(int(each.curve[i][1]) for each in tallies) for i in range(len(edges) - 1)]
    buckets = [
        Bucket(edges[i], edges[i + 1], math.fsum(each.curve[i][0] for each in tallies) / count, count)
        for i, count in enumerate(inside)
        if count
    ]
    return LengthScore(
        perplexity=_exp(nll),
        nll=nll,
        tokens=tokens,
        documents=len(tallies),
        windows=sum(each.windows for each in tallies),
        stderr=_standard_error(sums, counts, seed),
        bits_per_byte=math.fsum(each.nll for each in tallies) / math.log(2) / size if size else None,
        curve=tuple(buckets),
    )


def _standard_error(sums: np.ndarray, counts: np.ndarray, seed: int) -> float | None:
    """Standard deviation of the perplexity over resamples of the documents (with replacement)."""
    if len(sums) < 2:
        return None
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    means = (drawn @ sums) / (drawn @ counts)
    return float(np.exp(np.minimum(means, 700)).std(ddof=1))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
