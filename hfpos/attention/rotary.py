"""The score seam: rotary embeddings whose frequencies depend on the length, with keys cached unrotated.

Query i is scored with one set of frequencies, that of its own length, against every key: `<R(p_i f_i) q_i, R(p_j f_i) k_j>`. Nothing
of a longer call, of another row or of an earlier call enters, so a full forward, token-by-token decoding and chunked prefill agree.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim, R rotary_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from hfpos.attention.dense import full_mask
from hfpos.attention.seam import Seam
from hfpos.attention.sequence_parallel import refuse_ring
from hfpos.rotation import cos_sin, rotate


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.call import Call
    from hfpos.scheme import Geometry
    from hfpos.schemes._length_aware import LengthAwareRope

BLOCK_ELEMENTS = 2**24  # of keys rotated once for each query: 64 MiB in float32


class LengthAwareRotation(Seam):
    """Rotates queries and cached keys inside attention.

    Args:
        scheme: gives the frequencies of a length.
        geometry: of the model.
        convention: how the family pairs dimensions, `half` or `interleaved`.
        layers: those to rotate in, as the others keep what they have; None for all.
    """

    def __init__(
        self, scheme: LengthAwareRope, geometry: Geometry, convention: str, layers: frozenset[int] | None = None
    ) -> None:
        self.scheme = scheme
        self.geometry = geometry
        self.convention = convention
        self.layers = layers
        self.original_length = scheme.resolved_original(geometry)

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
        one_set = self._one_set(module, query, key, value, q_positions, k_positions, inner, kwargs)
        if call.lengths is not None:
            return one_set(call.lengths.to(query.device), slice(None), mask)
        lengths = q_positions + 1
        if query.shape[2] == 1:
            return one_set(lengths, slice(None), mask)
        compiling = torch.compiler.is_compiling()
        within = (lengths <= self.original_length).all(0)
        if not compiling and bool(within.all()):
            return one_set(lengths.new_full((1, 1), self.original_length), slice(None), mask)
        sets = self.scheme.few_sets(self.geometry)
        if sets is not None:
            short, long = (one_set(length.to(query.device).view(1, 1), slice(None), mask) for length in sets)
            weights = None
            if short[1] is not None and long[1] is not None:
                weights = torch.where((lengths > sets[0])[:, None, :, None], long[1], short[1])
            return torch.where((lengths > sets[0])[:, :, None, None], long[0], short[0]), weights
        mask = full_mask(mask, query, key, module, kwargs.get("is_causal"))
        # Queries within the original length, which come first, share the unscaled frequencies.
        split = 0 if compiling else int((~within).to(torch.uint8).argmax())
        parts = []
        if split:
            parts.append(one_set(lengths.new_full((1, 1), self.original_length), slice(0, split), mask))
        block = max(BLOCK_ELEMENTS // key.numel(), 1)
        for start in range(split, query.shape[2], block):
            columns = slice(start, min(start + block, query.shape[2]))
            arguments: tuple = (module, query, key, value, mask, q_positions, k_positions, columns, inner, kwargs)
            if torch.is_grad_enabled() and query.requires_grad and not compiling:
                parts.append(checkpoint(self._own_sets, *arguments, use_reentrant=False))
            else:
                parts.append(self._own_sets(*arguments))
        outputs, all_weights = zip(*parts, strict=True)
        return torch.cat(outputs, dim=1), None if all_weights[0] is None else torch.cat(all_weights, dim=2)

    def _frequencies(self, lengths: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The frequencies in float32, as stock rotations have them, and for queries of the `dtype` float64 in that."""
        wide = torch.promote_types(dtype, torch.float32)
        inv_freq, scale = self.scheme.frequencies_at(self.geometry, lengths)
        return inv_freq.to(wide), scale.to(wide)

    def _one_set(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        inner: Callable,
        kwargs: dict,
    ) -> Callable:
        """Attention where each row has one set of frequencies: `(lengths (B or 1, 1), columns, mask) -> (output, weights)`."""

        def attend(lengths: torch.Tensor, columns: slice, mask: torch.Tensor | None) -> tuple:
            inv_freq, scale = self._frequencies(lengths, query.dtype)
            q_cos, q_sin = cos_sin(q_positions[:, columns], inv_freq, scale)
            k_cos, k_sin = cos_sin(k_positions, inv_freq, scale)
            q = rotate(query[:, :, columns], q_cos[:, None], q_sin[:, None], self.convention)
            k = rotate(key, k_cos[:, None], k_sin[:, None], self.convention)
            if mask is not None:
                mask = mask[:, :, columns]
            return inner(module, q, k, value, mask, **kwargs)

        return attend

    def _own_sets(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        columns: slice,
        inner: Callable,
        kwargs: dict,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention where each query of `columns` has a set of frequencies of its own: every query becomes a row of the batch."""
        q = query[:, :, columns]
        batch, heads, queries, _ = q.shape
        inv_freq, scale = self._frequencies(q_positions[:, columns] + 1, query.dtype)
        q_cos, q_sin = cos_sin(q_positions[:, columns], inv_freq, scale)
        q = rotate(q, q_cos[:, None], q_sin[:, None], self.convention)
        k_cos, k_sin = cos_sin(k_positions[:, None], inv_freq[:, :, None], scale[:, :, None])  # (B, queries, K, R/2)
        keys, values = (x[:, None].expand(-1, queries, -1, -1, -1) for x in (key, value))
        keys = rotate(keys, k_cos[:, :, None], k_sin[:, :, None], self.convention).flatten(0, 1)
        values = values.flatten(0, 1)
        rows = q.transpose(1, 2).reshape(batch * queries, heads, 1, -1)
        if mask is not None:
            mask = mask[:, :, columns].transpose(1, 2).expand(batch, -1, -1, -1).flatten(0, 1)[:, :, None]
        output, weights = inner(module, rows, keys, values, mask, **kwargs)
        output = output.reshape(batch, queries, heads, -1)
        if weights is not None:
            weights = weights.reshape(batch, queries, heads, -1).transpose(1, 2)
        return output, weights
