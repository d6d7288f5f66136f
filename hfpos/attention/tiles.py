"""Which keys a block of queries sees near and which it sees far, and the mask of each.

Shapes: B batch, H heads, Q queries, K keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from hfpos.attention.dense import causal
from hfpos.attention.masks import seen_span


if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 256  # queries


class Tile(NamedTuple):
    """Some keys in a row, and what a block of queries may see of them.

    Attributes:
        span: the keys' indices.
        allowed: (B or 1, 1 or H, queries, keys) boolean.
        added: what is added to the logits, broadcast to the same shape; None for nothing.
    """

    span: slice
    allowed: torch.Tensor
    added: torch.Tensor | None

    def additive(self, dtype: torch.dtype) -> torch.Tensor:
        """The mask as a tensor of `dtype` to add to the logits. It is finite, so that a query that sees nothing gives finite numbers."""
        added = torch.zeros((), device=self.allowed.device) if self.added is None else self.added
        return torch.where(self.allowed, added.to(dtype), torch.finfo(dtype).min)


class Tiles:
    """Every block of queries with its far and its near keys. Made when asked for, so that never more than one block's masks are held.

    Args:
        mask: (B or 1, 1 or H, Q, K) boolean or additive, None for what `causal` says.
        q_positions, k_positions: (B or 1, Q) and (B or 1, K).
        window: a key is near to a query where the query's position minus its own is below it.
        causal: without a mask, query i sees keys 0 .. i; else it sees all.
    """

    def __init__(
        self,
        mask: torch.Tensor | None,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        window: int,
        causal: bool,
    ) -> None:
        self.queries = q_positions.shape[1]
        self.mask = None if mask is None else mask.expand(-1, -1, self.queries, -1)
        self.first_near = q_positions - window + 1
        self.k_positions = k_positions
        self.causal = causal

    def __iter__(self) -> Iterator[slice]:
        """The blocks, as slices of the queries."""
        for start in range(0, self.queries, BLOCK):
            yield slice(start, min(start + BLOCK, self.queries))

    def of(self, columns: slice) -> tuple[Tile, Tile]:
        """The far and the near keys of the queries in `columns`."""
        near = self.k_positions[:, None, None] >= self.first_near[:, None, columns, None]
        if self.mask is None:
            seen, added = self._without_mask(columns), None
        elif self.mask.dtype == torch.bool:
            seen, added = self.mask[:, :, columns], None
        else:
            added = self.mask[:, :, columns]
            seen = added > torch.finfo(added.dtype).min
        far_tile, near_tile = (_tile(seen & part, added) for part in (~near, near))
        return far_tile, near_tile

    def _without_mask(self, columns: slice) -> torch.Tensor:
        seen = causal(columns.stop - columns.start, self.k_positions.shape[1], self.k_positions.device, columns.start)
        return seen if self.causal else torch.ones_like(seen)


def _tile(allowed: torch.Tensor, added: torch.Tensor | None) -> Tile:
    """The keys that any query is allowed."""
    span = seen_span(allowed)
    return Tile(span, allowed[..., span], None if added is None else added[..., span])
