"""What one layer works out for the others of the same forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.call import Call

T = TypeVar("T")


def once(call: Call, what: str, made_of: tuple, make: Callable[[], T]) -> T:
    """`make()`, or what it gave to an earlier layer of this forward that had the very same objects.

    Args:
        call: of the forward; keeps what was made.
        what: is made.
        made_of: the objects that it follows from.
    """
    if call.memo is None or torch.compiler.is_compiling():  # whose objects have no lasting identity
        return make()
    known: dict[Any, Any] = call.memo.known
    key = (what, *map(id, made_of))
    if key not in known:
        # with the objects themselves: while they are kept, their ids are their own
        known[key] = make(), made_of
    return known[key][0]
