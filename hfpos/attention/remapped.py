"""The score seam where a pair of tokens is rotated by positions that depend on the pair: Self-Extend, ReRoPE, dual chunk, LM-Infinite.

A scheme names a few branches: in which of them a query sees a key goes by the two positions alone, and with it the positions by which the
two are rotated. Keys are cached unrotated, so a full forward, token-by-token decoding and chunked prefill agree. Queries go in blocks, each
to the keys of each branch that it has; what no query of a block sees is not computed. Two ways lead to the one softmax over all branches:
calls of a kernel that are merged (`merged.py`), or one call of the model's own attention function with wider heads, where no such kernel
fits. Neither holds more than a block of queries by its keys, forward or backward; the second computes each block again in the backward pass.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim, R rotary_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from hfpos.attention.interface import is_fused
from hfpos.attention.merged import Ways, can_merge, merged_attention
from hfpos.attention.once import once
from hfpos.attention.seam import Seam
from hfpos.attention.sequence_parallel import refuse_ring
from hfpos.attention.single_query import single_query
from hfpos.attention.tiles import Tiles
from hfpos.attention.turn import Turn
from hfpos.attention.whole_rows import refuse_whole_rows


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.call import Call
    from hfpos.scheme import Geometry
    from hfpos.schemes._remapping import Remapping


class RemappedRotation(Seam):
    """Rotates queries and cached keys inside attention, by the positions of the branch in which they meet.

    Args:
        scheme: gives the branches.
        geometry: of the model.
        convention: how the family pairs dimensions, `half` or `interleaved`.
        layers: those to rotate in, as the others keep what they have; None for all.
        inv_freq: (R/2,) radians per token; the scheme's unless given.
    """

    def __init__(
        self,
        scheme: Remapping,
        geometry: Geometry,
        convention: str,
        layers: frozenset[int] | None = None,
        inv_freq: torch.Tensor | None = None,
    ) -> None:
        self.scheme = scheme
        self.geometry = geometry
        self.layers = layers
        inv_freq = scheme.frequencies(geometry)[0] if inv_freq is None else inv_freq
        self.turn = Turn(inv_freq, convention)

    def act(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        positions: tuple[torch.Tensor, torch.Tensor],
        *,
        call: Call,
        inner: Callable,
        backend: str,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of unrotated query (B, H, Q, D) to unrotated key, value (B, Hkv, K, D): output (B, Q, H, D) and the weights, if any."""
        refuse_ring(call.part, self.scheme.name)
        refuse_whole_rows(self.scheme.name, module, kwargs)
        compiling = torch.compiler.is_compiling()
        if self._unchanged(positions, call):
            query, key = (self.turn.as_stock(x, p, call) for x, p in zip((query, key), positions, strict=True))
            return inner(module, query, key, value, mask, **kwargs)
        q_positions, k_positions = positions
        branches = once(
            call, "branches", (self, *positions), lambda: self.scheme.branches(self.geometry, q_positions, k_positions)
        )
        query = self._scaled(query, q_positions)
        if query.shape[2] == 1:
            return single_query(
                self, module, query, key, value, mask, branches, k_positions, call=call, inner=inner, options=kwargs
            )
        turned, index = [], []
        for x, places in ((query, [branch.query for branch in branches]), (key, [branch.key for branch in branches])):
            distinct, of_branch = _distinct(places)
            turned.append([self.turn(x, place, call) for place in distinct])
            index.append(of_branch)
        ways = Ways(turned[0], turned[1], list(zip(*index, strict=True)))
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        tiles = Tiles(mask, branches, query.shape[2], k_positions, causal)
        if is_fused(inner) and can_merge(query, value, kwargs):
            return merged_attention(ways, value, tiles, kwargs.get("scaling")), None
        again = torch.is_grad_enabled() and not compiling and any(x.requires_grad for x in (query, key, value))
        parts = []
        for columns in tiles:
            arguments: tuple = (module, ways, value, tiles, columns, inner, kwargs)
            parts.append(checkpoint(_one_call, *arguments, use_reentrant=False) if again else _one_call(*arguments))
        outputs, weights = zip(*parts, strict=True)
        return torch.cat(outputs, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)

    def _unchanged(self, positions: tuple[torch.Tensor, torch.Tensor], call: Call) -> bool:
        """Whether the scheme changes nothing for these tokens; compiled code cannot look at the numbers and goes the long way."""
        if torch.compiler.is_compiling():
            return False
        return once(
            call, "unchanged", (self, *positions), lambda: bool(self.scheme.unchanged(self.geometry, *positions))
        )

    def _scaled(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The queries (B, H, Q, D), multiplied by what the scheme has for their positions (B or 1, Q)."""
        factor = self.scheme.query_factor(self.geometry, positions)
        if factor is None:
            return query
        wide = torch.promote_types(query.dtype, torch.float32)
        return (query * factor[:, None, :, None].to(wide)).to(query.dtype)


def _distinct(tensors: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    """The tensors, each once, and for each of `tensors` which of them it is."""
    found: list[torch.Tensor] = []
    index = []
    for tensor in tensors:
        place = next((number for number, other in enumerate(found) if other is tensor), len(found))
        found += [tensor] if place == len(found) else []
        index.append(place)
    return found, index


def _one_call(
    module: Any, ways: Ways, value: torch.Tensor, tiles: Tiles, columns: slice, inner: Callable, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a block of queries by the model's own function, with whatever that does to logits and weights.

    Heads are as wide as all branches together: a query has its rotation for each branch in a place of its own, a key has zeros in the
    places of the branches that it is not seen in.
    """
    seen = tiles.of(columns)
    width, value_width, count = ways.queries[0].shape[-1], value.shape[-1], len(ways.of_branch)
    query = torch.cat([ways.queries[way][:, :, columns] for way, _ in ways.of_branch], dim=-1)
    key = torch.cat(
        [
            pad(ways.keys[ways.of_branch[t.way][1]][:, :, t.span], (t.way * width, (count - 1 - t.way) * width))
            for t in seen
        ],
        dim=2,
    )
    values = torch.cat([value[:, :, tile.span] for tile in seen], dim=2)
    if is_fused(inner) and value_width == width:  # fused kernels want values as wide as keys
        values = pad(values, (0, (count - 1) * width))
    masks = [tile.additive(query.dtype) for tile in seen]
    rows, heads = (max([1, *[mask.shape[axis] for mask in masks if mask is not None]]) for axis in (0, 1))
    shapes = [(rows, heads, query.shape[2], tile.span.stop - tile.span.start) for tile in seen]
    mask = torch.cat(
        [
            query.new_zeros(shape) if mask is None else mask.expand(shape)
            for mask, shape in zip(masks, shapes, strict=True)
        ],
        dim=-1,
    ).expand(query.shape[0], -1, -1, -1)
    scaling = kwargs.get("scaling")
    options = kwargs | {"scaling": width**-0.5 if scaling is None else scaling}
    output, weights = inner(module, query, key, values, mask, **options)
    if weights is not None:
        parts = weights.split([shape[-1] for shape in shapes], dim=-1)
        weights = weights.new_zeros(*weights.shape[:-1], value.shape[2])
        for tile, part in zip(seen, parts, strict=True):
            weights[..., tile.span] += part
    return output[..., :value_width], weights
