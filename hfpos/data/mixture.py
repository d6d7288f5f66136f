"""A mixture of sources of text: what each is, how many samples it gives, and in what order they are seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfpos.data.sources import describe_source
from hfpos.scheme import PatchError


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
        path: a file of text, JSON lines (.jsonl, .jsonl.gz) or parquet, or a folder of these; a name that
            `datasets.load_dataset` takes, its configuration behind a colon; "stdlib" for Python's standard library; a `datasets` object; a list of strings.
        weight: share of the samples, relative to the other weighted sources. They have together as many samples as their texts
            give: a source is repeated, or a random part of it is seen. None: as many samples as the text gives.
        split: of a dataset that has several; a folder with `split` is read by `datasets.load_dataset`.
        text_column: the field that holds the text, where there are rows.
        min_tokens: shorter documents are left out.
        long_tokens: documents of at least so many tokens are seen `long_times` an epoch.
        long_times: see `long_tokens`.
        max_tokens: only the first so many tokens of the source are read.
        streaming: read a dataset's name or folder by `datasets.load_dataset(..., streaming=True)`, which downloads no more than
            is asked for.

    Raises:
        PatchError: a value out of range, or one without the other it belongs to.
    """

    path: Any
    weight: float | None = None
    split: str | None = None
    text_column: str = "text"
    min_tokens: int = 0
    long_tokens: int | None = None
    long_times: int = 1
    max_tokens: int | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        named = f"source {self.name}: "
        weight = self.weight
        if weight is not None and (
            isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf
        ):
            raise PatchError(
                f"{named}weight={weight!r}; expected a number above 0, or None for as many samples as there are"
            )
        for field, least in {"min_tokens": 0, "long_tokens": 1, "long_times": 1, "max_tokens": 1}.items():
            value = getattr(self, field)
            if value is not None or field in ("min_tokens", "long_times"):
                require_whole(f"{named}{field}", value, least)
        if self.long_times > 1 and self.long_tokens is None:
            raise PatchError(
                f"{named}long_times={self.long_times} needs long_tokens, from which on a document is long"
            )

    @property
    def name(self) -> str:
        """A short name for errors and the record."""
        return describe_source(self.path)


def require_whole(name: str, value: Any, least: int) -> None:
    """Raise PatchError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PatchError(f"{name}={value!r}; expected a whole number of at least {least}")


def shares(own: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """How many samples each source gives to an epoch.

    Args:
        own: how many samples the text of each source gives.
        weights: of each source. Those with a weight have together as many samples as their texts give, divided by weight; largest
            remainders are rounded up. None: as many as its own.

    >>> shares([10, 30, 7], [1, 3.0, None]), shares([10, 30, 7], [1, 1, 1])
    ([10, 30, 7], [16, 16, 15])
    """
    weighted = [index for index, weight in enumerate(weights) if weight is not None]
    total = sum(own[index] for index in weighted)
    sum_of_weights = math.fsum(weights[index] or 0 for index in weighted)
    exact = {index: total * ((weights[index] or 0) / sum_of_weights) for index in weighted}
    given = list(own)
    for index in weighted:
        given[index] = math.floor(exact[index])
    left = total - sum(given[index] for index in weighted)
    for index in sorted(weighted, key=lambda index: given[index] - exact[index])[:left]:
        given[index] += 1
    return given


def sample_order(own: int, wanted: int, seed: Sequence[int]) -> np.ndarray:
    """Which samples of a source are seen, in order: (wanted,) int64. All of them, then all again in another order, and so on.

    Sample `i` in round `r` is number `r * own + i`.

    >>> sample_order(4, 6, seed=[0]) // 4
    array([0, 0, 0, 0, 1, 1])
    """
    rounds = -(-wanted // own)
    orders = [np.random.default_rng([*seed, turn]).permutation(own) + turn * own for turn in range(rounds)]
    return np.concatenate(orders)[:wanted]


def interleave(counts: Sequence[int], seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mix the samples of several sources evenly: of any stretch of the epoch, each source has about its share.

    Returns:
        source: (samples,) int64, whose turn it is.
        turn: (samples,) int64, how many samples of that source came before.

    >>> interleave([2, 6], seed=[0])[0].reshape(2, 4).sum(axis=1)
    array([3, 3])
    """
    draw = np.random.default_rng(seed)
    # sample k of n lies at a random place in the k-th of n equal parts of the epoch
    places = np.concatenate([(np.arange(count) + draw.random(count)) / count for count in counts])
    source = np.repeat(np.arange(len(counts)), counts)
    turn = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort(places, kind="stable")
    return source[order], turn[order]
