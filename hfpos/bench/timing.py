"""Timing of contenders in turn, in one process: quote the ratios, absolute times belong to the machine."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def in_turn(
    contenders: Mapping[str, Callable[[], object]], rounds: int = 7, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every contender, `rounds` times, one after the other in each round, so that a drift of the machine hits all alike.

    >>> sorted(in_turn({"a": lambda: None, "b": lambda: None}, rounds=2))
    ['a', 'b']
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        # alternate the order: neither contender always runs on the caches that the other has left
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """The median over the rounds of `one` / `other`, taken round by round."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))
