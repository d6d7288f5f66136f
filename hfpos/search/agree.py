"""Several processes that search together must all take the same path: what one of them reads or measures is the word of the main one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hfpos.evaluate.processes import gather, is_main, launched
from hfpos.scheme import PatchError


T = TypeVar("T")


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, in every process; the others do not call it. Its `PatchError` is raised in all.

    >>> from_main(lambda: 3)
    3
    """
    if not launched():
        return make()
    made: list[T] = []
    error = None
    if is_main():
        try:
            made.append(make())
        except PatchError as caught:
            error = caught
    return gather(made, error, processes=2)[0]
