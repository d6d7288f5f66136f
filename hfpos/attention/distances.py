"""A bias that depends on the distance alone, as one row of numbers for each head.

Row i of `bias[i, j] = row[i - j]` is row i - 1 moved by one. With the queries in reverse order both steps, to the next query and to the next
key, are a step of one in the same direction along the row, so that a block of the bias is a view of it and takes no memory. Keys that are
not seen have distances below zero, which the row holds as minus infinity.

Shapes: H heads, Q queries, K keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfpos.attention.dense import bias_of


if TYPE_CHECKING:
    from hfpos.attention.blocks import Sight
    from hfpos.scheme import Bias


class Distances:
    """The bias at every distance that occurs.

    Args:
        row: (H, Q + K - 1), the bias at the distances Q - 1, Q - 2, ... -(K - 1).
        queries, keys: how many there are.
        causal: query i sees keys 0 .. i only.
    """

    def __init__(self, row: torch.Tensor, queries: int, keys: int, causal: bool) -> None:
        self.row = row
        self.queries = queries
        self.keys = keys
        self.causal = causal

    @classmethod
    def of(cls, scheme: Bias, weights: dict[str, torch.Tensor], sight: Sight) -> Distances | None:
        """The bias of `scheme`, where it depends on distances alone and these are the distances of indices; else None."""
        if not scheme.relative or torch.compiler.is_compiling():
            return None
        q_positions, k_positions = sight.q_positions, sight.k_positions
        if not sight.counted or bool((q_positions[:, 0] != k_positions[:, 0]).any()):
            return None
        queries, keys = q_positions.shape[1], k_positions.shape[1]
        distances = torch.arange(queries - 1, -keys, -1, device=q_positions.device)
        row = bias_of(scheme, distances[None], distances.new_zeros(1, 1), weights)[0, :, :, 0]
        if sight.causal:
            row = row.masked_fill(distances < 0, float("-inf"))
        return cls(row.contiguous(), queries, keys, sight.causal)

    def view(self, columns: slice) -> tuple[slice, torch.Tensor]:
        """The keys that the queries in `columns` see, and the bias (1, H, queries of the block, keys) of these queries in reverse order."""
        seen = min(columns.stop, self.keys) if self.causal else self.keys
        start = self.queries - columns.stop  # the distance from the block's last query to key 0
        return slice(0, seen), _Slide.apply(self.row, start, columns.stop - columns.start, seen)[None]


class _Slide(torch.autograd.Function):
    """`row` (H, N) -> (H, queries, keys) with entry (i, j) = `row[start + i + j]`: a view, whose backward sums along its diagonals."""

    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, start: int, queries: int, keys: int) -> torch.Tensor:
        ctx.length, ctx.start = row.shape[1], start
        return row.as_strided((row.shape[0], queries, keys), (row.stride(0), 1, 1), row.storage_offset() + start)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        given = gradients[0]
        heads, queries, keys = given.shape
        # each row moved by one against the one before: rows of queries + keys in a row of memory, read with rows one shorter
        wide = torch.nn.functional.pad(given, (0, queries)).flatten(1)
        slanted = wide[:, : queries * (queries + keys - 1)].view(heads, queries, queries + keys - 1)
        found = given.new_zeros(heads, ctx.length)
        found[:, ctx.start : ctx.start + queries + keys - 1] = slanted.sum(1)
        return found, None, None, None
