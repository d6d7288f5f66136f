"""A bias over blocks of queries: SDPA for each block, with the bias of that block only.

Never more of the bias is held than `block x keys`. Where it depends on the distance alone and positions count up by one, not even that: a
row of numbers for each head, one for each distance, is all there is, and a block's bias is a view of it (`distances.py`). In the backward
pass a block's bias and weights are computed again, unless they are such a view and nothing in it is learned.

Shapes: B batch, H heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from hfpos.attention.dense import add_bias, bias_of, causal
from hfpos.attention.masks import seen_span, visible


if TYPE_CHECKING:
    from collections.abc import Iterator

    from hfpos.attention.distances import Distances
    from hfpos.scheme import Bias

    Weights = dict[str, torch.Tensor]

# Queries of a block whose bias costs no memory: few where a block would show much that is not seen, else so many that the CPU kernel takes
# its large tiles, which it does from 768 on.
FEWEST, LARGE, MOST = 256, 768, 1024
ELEMENTS = 2**24  # of the bias of a block that does: 64 MiB in float32


@dataclass(frozen=True)
class Sight:
    """Which keys a query sees, and where the two stand.

    Attributes:
        mask: (B or 1, 1 or H, Q, K) boolean or additive; None for what `causal` says.
        causal: without a mask query i sees keys 0 .. i, else all.
        q_positions, k_positions: (B or 1, Q) and (B or 1, K).
    """

    mask: torch.Tensor | None
    causal: bool
    q_positions: torch.Tensor
    k_positions: torch.Tensor

    @property
    def counted(self) -> bool:
        """Whether positions count up by one, so that the distance of two tokens is that of their indices but for a constant."""
        return all(bool((x.diff(dim=-1) == 1).all()) for x in (self.q_positions, self.k_positions))

    def of(self, columns: slice) -> tuple[slice, torch.Tensor | None]:
        """The keys that the queries in `columns` see between them, as one slice, and the mask of these, if any."""
        keys = self.k_positions.shape[1]
        if self.mask is None:
            if not self.causal:
                return slice(0, keys), None
            span = slice(0, min(columns.stop, keys))
            return span, causal(columns.stop - columns.start, span.stop, self.k_positions.device, columns.start)
        mask = self.mask[:, :, columns] if self.mask.shape[2] > 1 else self.mask
        span = seen_span(visible(mask))
        return span, mask[..., span]


def block_attention(
    scheme: Bias,
    weights: Weights,
    sight: Sight,
    distances: Distances | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    drop: float = 0.0,
) -> torch.Tensor:
    """Attention with the bias of `scheme`: query (B, H, Q, D), key and value (B, H, K, D) -> (B, Q, H, D).

    Args:
        weights: of the scheme.
        sight: who sees what, and from where.
        distances: the same bias by distance, where it goes by that alone.
        scaling: the factor on the logits before the bias.
        drop: the probability of attention dropout.
    """
    learning = torch.is_grad_enabled() and any(x.requires_grad for x in weights.values())
    differentiable = torch.is_grad_enabled() and (learning or any(x.requires_grad for x in (query, key, value)))
    rows = _rows(query, key, free=distances is not None and not learning)
    if distances is not None:
        of_block = partial(_with_view, distances, scaling=scaling, drop=drop)
        again = learning
    else:
        of_block = partial(_with_bias, scheme, weights, sight, scaling=scaling, drop=drop)
        again = differentiable and not torch.compiler.is_compiling()
    backwards = distances is not None  # then the queries of a block come in reverse order
    blocks = list(_blocks(query.shape[2], rows))
    if not differentiable:
        output: Any = None
        for columns in blocks:
            index = torch.arange(columns.start, columns.stop, device=query.device)
            part = of_block(query, key, value, columns).transpose(1, 2)
            if output is None:  # now that its dtype is known, which autocast may have changed
                output = part.new_empty(part.shape[0], query.shape[2], *part.shape[2:])
            output.index_copy_(1, index.flip(0) if backwards else index, part)
        return output
    parts = []
    for columns in blocks:
        if again:
            part = checkpoint(of_block, query, key, value, columns, use_reentrant=False)
        else:
            part = of_block(query, key, value, columns)
        parts.append(part.transpose(1, 2))
    return torch.cat(parts[::-1], dim=1).flip(1) if backwards else torch.cat(parts, dim=1)


def _blocks(queries: int, rows: int) -> Iterator[slice]:
    for start in range(0, queries, rows):
        yield slice(start, min(start + rows, queries))


def _rows(query: torch.Tensor, key: torch.Tensor, free: bool) -> int:
    """How many queries make a block: more are faster, fewer compute less that is not seen and hold less."""
    batch, heads, queries, _ = query.shape
    if free:
        return FEWEST if queries < 4 * LARGE else min(max(queries // 8, LARGE), MOST)
    return min(max(ELEMENTS // (batch * heads * key.shape[2]), 16), FEWEST)


def _with_view(
    distances: Distances, query: Any, key: Any, value: Any, columns: slice, *, scaling: float, drop: float
) -> torch.Tensor:
    """One block, in reverse order, whose bias is a view of a row of numbers."""
    span, bias = distances.view(columns)
    return _attend(query[:, :, columns].flip(2), key[:, :, span], value[:, :, span], bias, scaling, drop)


def _with_bias(
    scheme: Bias,
    weights: Weights,
    sight: Sight,
    query: Any,
    key: Any,
    value: Any,
    columns: slice,
    *,
    scaling: float,
    drop: float,
) -> torch.Tensor:
    """One block whose bias is written out."""
    span, mask = sight.of(columns)
    queries = query[:, :, columns]
    scaled = queries * scaling if scheme.reads_query else None
    bias = bias_of(scheme, sight.q_positions[:, columns], sight.k_positions[:, span], weights, scaled)
    wide = torch.promote_types(query.dtype, torch.float32)
    return _attend(queries, key[:, :, span], value[:, :, span], add_bias(bias, mask, wide), scaling, drop)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scaling: float, drop: float
) -> torch.Tensor:
    """SDPA; written out where a gradient of the bias is wanted on a CPU, whose kernel has none."""
    if not (bias.requires_grad and torch.is_grad_enabled() and query.device.type == "cpu"):
        if query.device.type != "cpu":
            bias = bias.to(query.dtype)  # which other kernels want
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=drop, scale=scaling)
    with torch.autocast("cpu", enabled=False):
        wide_query, wide_key, wide_value = (x.to(bias.dtype) for x in (query, key, value))
        weights = dropout((wide_query * scaling @ wide_key.mT + bias).softmax(-1), p=drop)
        return (weights @ wide_value).to(value.dtype)
