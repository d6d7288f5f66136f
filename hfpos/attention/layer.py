"""What one layer brings to biased attention.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfpos.attention.dense import add_bias, bias_of, full_mask
from hfpos.attention.separable import separable_attention


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hfpos.attention.blocks import Sight
    from hfpos.attention.sequence_parallel import Part


@dataclass(frozen=True)
class Layer:
    """What one layer brings to attention.

    Attributes:
        query, key, value: (B, H, Q, D), and twice (B, Hkv, K, D).
        scheme: the bias of the heads that are here; of all, unless processes share them.
        weights: of the scheme in this layer.
        sight: who sees what, and from where.
        part: this process's part of a sequence that several share.
        scaling: the factor on the logits before the bias.
        options: whatever else the model hands to attention.
    """

    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scheme: Any
    weights: dict[str, torch.Tensor]
    sight: Sight
    part: Part | None
    scaling: float
    options: dict[str, Any]

    def by(self, inner: Callable, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention by a stock function."""
        return inner(self.module, self.query, self.key, self.value, mask, scaling=self.scaling, **self.options)

    def additive_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """The bias (B, H, Q, K), with the dtype's minimum where a query does not see a key."""
        sight, query = self.sight, self.query
        scaled = query * self.scaling if self.scheme.reads_query else None
        bias = bias_of(self.scheme, sight.q_positions, sight.k_positions, self.weights, scaled)
        mask = full_mask(sight.mask, query, self.key, self.module, sight.causal)
        return add_bias(bias, mask, dtype).expand(query.shape[0], -1, -1, -1)

    def separated(self, inner: Callable) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention by a stock function with the bias as extra dimensions."""
        positions = self.sight.q_positions, self.sight.k_positions
        centre = None if self.part is None else self.part.centre.to(self.query.device)
        tensors = self.module, self.query, self.key, self.value, self.sight.mask
        return separable_attention(
            self.scheme,
            self.weights,
            positions,
            inner,
            *tensors,
            scaling=self.scaling,
            centre=centre,
            **self.options,
        )
