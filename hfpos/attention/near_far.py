"""The score seam with two rotations: near keys are seen at their own distance, far ones at the distance that the scheme gives them.

Keys are cached unrotated. Whether a key is near depends on the two positions alone, so a full forward, token-by-token decoding and
chunked prefill agree. Queries go in blocks, each to its far keys and to its near ones; only the few keys that are near to some of its
queries and far from others are looked at twice. Two ways lead to the one softmax over both kinds: two calls of a kernel that are merged
(`merged.py`), or one call of the model's own attention function with heads of double width, where no such kernel fits. Neither holds
more than a block of queries by its keys, forward or backward; the second computes each block again in the backward pass.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim, R rotary_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from hfpos.attention.interface import is_fused
from hfpos.attention.merged import can_merge, merged_attention
from hfpos.attention.seam import Seam
from hfpos.attention.sequence_parallel import refuse_ring
from hfpos.attention.tiles import Tiles
from hfpos.constant import Constant
from hfpos.rotation import cos_sin, rotate
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.positions import Call
    from hfpos.scheme import Geometry
    from hfpos.schemes.self_extend import SelfExtend

    Two = tuple[torch.Tensor, torch.Tensor]  # as far keys or queries are seen, and as near ones are

# What an attention function may be given and what does not fit a block's keys.
OF_WHOLE_ROWS = ("position_bias", "cache")


class NearFarRotation(Seam):
    """Rotates queries and cached keys inside attention, by one of two pairs of positions.

    Args:
        scheme: gives the window (`i - j < window` is near) and the positions of what is far.
        geometry: of the model.
        convention: how the family pairs dimensions, `half` or `interleaved`.
        layer_type: rotate in layers of this type only, as the others keep their own rotation; None for all.
        inv_freq: (R/2,) radians per token; the scheme's unless given.
    """

    def __init__(
        self,
        scheme: SelfExtend,
        geometry: Geometry,
        convention: str,
        layer_type: str | None = None,
        inv_freq: torch.Tensor | None = None,
    ) -> None:
        self.scheme = scheme
        self.geometry = geometry
        self.convention = convention
        self.layer_type = layer_type
        self.window = scheme.resolved_window(geometry)
        self.inv_freq = Constant(scheme.frequencies(geometry)[0] if inv_freq is None else inv_freq)

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
        q_positions, k_positions = positions
        if query.shape[2] == 1:
            k_positions = self._seen_by_one(q_positions, k_positions)
        if query.shape[2] == 1 or self._all_near(q_positions, k_positions):
            query, key = self._turn(query, q_positions), self._turn(key, k_positions)
            return inner(module, query, key, value, mask, **kwargs)
        self._refuse(module, kwargs)
        (q_far, _), (_, k_far) = (self.scheme.far_positions(self.geometry, x) for x in (q_positions, k_positions))
        queries = self._turn(query, q_far), self._turn(query, q_positions)
        keys = self._turn(key, k_far), self._turn(key, k_positions)
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        tiles = Tiles(mask, q_positions, k_positions, self.window, causal)
        if is_fused(inner) and can_merge(query, value, kwargs):
            return merged_attention(queries, keys, value, tiles, kwargs.get("scaling")), None
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        again = again and any(x.requires_grad for x in (query, key, value))
        parts = []
        for columns in tiles:
            arguments: tuple = (module, queries, keys, value, tiles, columns, inner, kwargs)
            parts.append(checkpoint(_one_call, *arguments, use_reentrant=False) if again else _one_call(*arguments))
        outputs, weights = zip(*parts, strict=True)
        return torch.cat(outputs, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)

    def _all_near(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> bool:
        if torch.compiler.is_compiling():  # which cannot look at the numbers
            return False
        return bool((q_positions.amax(-1) - k_positions.amin(-1) < self.window).all())

    def _seen_by_one(self, q_positions: torch.Tensor, k_positions: torch.Tensor) -> torch.Tensor:
        """Where keys (B, K) stand for a single query (B, 1) that stays where it is: a far one at its far distance from there."""
        far_query, _ = self.scheme.far_positions(self.geometry, q_positions)
        _, far_keys = self.scheme.far_positions(self.geometry, k_positions)
        return torch.where(q_positions - k_positions < self.window, k_positions, q_positions - far_query + far_keys)

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = cos_sin(positions, self.inv_freq.on(x.device))
        return rotate(x, cos[:, None], sin[:, None], self.convention)

    def _refuse(self, module: Any, options: dict) -> None:
        for name in OF_WHOLE_ROWS:
            if options.get(name) is not None:
                raise PatchError(
                    f"{type(module).__name__} hands {name!r} to attention, which {self.scheme.name!r} computes for a few keys at a time; use a "
                    "scheme of the freq seam"
                )


def _one_call(
    module: Any,
    queries: Two,
    keys: Two,
    value: torch.Tensor,
    tiles: Tiles,
    columns: slice,
    inner: Callable,
    kwargs: dict,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of a block of queries by the model's own function, with whatever that does to logits and weights.

    A query has its far rotation in the first half of a head of double width and its near one in the second; a far key has zeros in the
    second half, a near key in the first.
    """
    pair = tiles.of(columns)
    width, value_width = queries[0].shape[-1], value.shape[-1]
    query = torch.cat([x[:, :, columns] for x in queries], dim=-1)
    places = (0, width), (width, 0)
    key = torch.cat([pad(x[:, :, t.span], place) for x, t, place in zip(keys, pair, places, strict=True)], dim=2)
    values = torch.cat([value[:, :, tile.span] for tile in pair], dim=2)
    if is_fused(inner) and value_width == width:  # fused kernels want values as wide as keys
        values = pad(values, (0, width))
    mask = torch.cat([tile.additive(query.dtype) for tile in pair], dim=-1).expand(query.shape[0], -1, -1, -1)
    scaling = kwargs.get("scaling")
    options = kwargs | {"scaling": width**-0.5 if scaling is None else scaling}
    output, weights = inner(module, query, key, values, mask, **options)
    if weights is not None:
        parts = weights.split([tile.allowed.shape[-1] for tile in pair], dim=-1)
        weights = weights.new_zeros(*weights.shape[:-1], value.shape[2])
        for tile, part in zip(pair, parts, strict=True):
            weights[..., tile.span] += part
    return output[..., :value_width], weights
