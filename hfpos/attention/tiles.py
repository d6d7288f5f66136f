"""Which keys a block of queries sees in each branch of a scheme, and the mask of each piece that needs one.

Shapes: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from hfpos.attention.dense import causal
from hfpos.schemes._remapping import inside


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hfpos.schemes._remapping import Branch

BLOCK = 256  # queries
WORTHWHILE = 128  # keys that all queries of a block see, for which a call without a mask is worth it


class Tile(NamedTuple):
    """Some keys in a row, and what a block of queries may see of them.

    Attributes:
        way: the index of the branch.
        span: the keys' indices.
        allowed: (B or 1, 1 or H, queries, keys) boolean; None where every query sees every key.
        added: what is added to the logits, broadcast to the same shape; None for nothing.
    """

    way: int
    span: slice
    allowed: torch.Tensor | None
    added: torch.Tensor | None

    def additive(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The mask as a tensor of `dtype` to add to the logits. It is finite, so that a query that sees nothing gives finite numbers."""
        if self.allowed is None:
            return None
        added = torch.zeros((), device=self.allowed.device) if self.added is None else self.added
        return torch.where(self.allowed, added.to(dtype), torch.finfo(dtype).min)


class Tiles:
    """Every block of queries with the keys of each branch. Made when asked for, so that never more than one block's masks are held.

    Args:
        mask: (B or 1, 1 or H, Q, K) boolean or additive, None for what `causal` says.
        branches: of the scheme.
        queries: Q.
        k_positions: (B or 1, K).
        causal: without a mask, query i sees keys 0 .. i; else it sees all.
    """

    def __init__(
        self,
        mask: torch.Tensor | None,
        branches: Sequence[Branch],
        queries: int,
        k_positions: torch.Tensor,
        causal: bool,
    ) -> None:
        self.queries = queries
        self.mask = None if mask is None else mask.expand(-1, -1, queries, -1)
        self.branches = branches
        self.k_positions = k_positions
        self.causal = causal

    def __iter__(self) -> Iterator[slice]:
        """The blocks, as slices of the queries."""
        for start in range(0, self.queries, BLOCK):
            yield slice(start, min(start + BLOCK, self.queries))

    def of(self, columns: slice) -> list[Tile]:
        """What the queries in `columns` see: one tile at least, and none for a branch that none of them uses."""
        seen, added = self._seen(columns)
        if torch.compiler.is_compiling():  # which cannot look at the numbers
            return [self._tile(way, slice(0, self.k_positions.shape[1]), columns, seen, added) for way in self._ways]
        some, every = self._shown(columns, seen)
        tiles = []
        for way, branch in enumerate(self.branches):
            for span, masked in _pieces(*_within(branch, columns, self.k_positions, some, every)):
                if masked or added is not None:
                    tiles.append(self._tile(way, span, columns, seen, added))
                else:
                    tiles.append(Tile(way, span, None, None))
        return tiles or [self._tile(0, slice(0, 1), columns, seen, added)]

    @property
    def _ways(self) -> range:
        return range(len(self.branches))

    def _seen(self, columns: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the mask lets the queries in `columns` see, boolean, and what it adds; None for what is not there."""
        if self.mask is None:
            return None, None
        mask = self.mask[:, :, columns]
        return (mask, None) if mask.dtype == torch.bool else (mask > torch.finfo(mask.dtype).min, mask)

    def _shown(self, columns: slice, seen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Which keys (K,) some query of the block sees, and which every one does, whatever the branch."""
        if seen is not None:
            return seen.flatten(0, -2).any(0), seen.flatten(0, -2).all(0)
        keys = torch.arange(self.k_positions.shape[1], device=self.k_positions.device)
        return (keys < columns.stop, keys <= columns.start) if self.causal else (keys >= 0, keys >= 0)

    def _tile(
        self, way: int, span: slice, columns: slice, seen: torch.Tensor | None, added: torch.Tensor | None
    ) -> Tile:
        allowed = inside(self.branches[way], self.k_positions[:, None, span], columns)[:, None]
        queries, keys = columns.stop - columns.start, span.stop - span.start
        if seen is not None:
            allowed = allowed & seen[..., span]
        elif self.causal:
            allowed = allowed & causal(queries, keys, allowed.device, columns.start - span.start)
        return Tile(way, span, allowed.expand(-1, -1, queries, -1), None if added is None else added[..., span])


def _within(
    branch: Branch, columns: slice, keys: torch.Tensor, some: torch.Tensor, every: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the keys that some and that every query of the block sees, those that are so in this branch: (K,) each."""
    for bound, begins in ((branch.first, True), (branch.stop, False)):
        if bound is not None:
            low, high = (edge(bound[:, columns], dim=-1, keepdim=True) for edge in (torch.amin, torch.amax))
            some = some & (keys >= low if begins else keys < high).any(0)
            every = every & (keys >= high if begins else keys < low).all(0)
    return some, every


def _pieces(some: torch.Tensor, every: torch.Tensor) -> Iterator[tuple[slice, bool]]:
    """The span of `some` in up to three parts, and whether a part needs a mask: all of it does but a long run of `every`."""
    span, whole = _span(some), _span(every)
    if span is None:
        return
    length = 0 if whole is None else whole.stop - whole.start
    if whole is None or length < WORTHWHILE or length != int(every.sum()):
        yield span, True
        return
    if span.start < whole.start:
        yield slice(span.start, whole.start), True
    yield whole, False
    if whole.stop < span.stop:
        yield slice(whole.stop, span.stop), True


def _span(keys: torch.Tensor) -> slice | None:
    index = keys.nonzero()
    return slice(int(index[0]), int(index[-1]) + 1) if len(index) else None
