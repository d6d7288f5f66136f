"""Rotary position embedding, unscaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, Rope, require_number


@dataclass(frozen=True, kw_only=True)
class Rotary(Rope):
    """Rotary position embedding: queries and keys are rotated by `position * theta ** (-2 i / d)`.

    On a model that already rotates, this takes any scaling away again. On GPT-2 and BLOOM it replaces their own positions.

    Without a model `Rotary(...)(q, k, positions)` rotates queries and keys, see `__call__`; so does every scheme of the freq seam.

    Paper: RoFormer, arXiv 2104.09864.

    Args:
        theta: the base; the model's own unless given (10,000 on a model without rotary embeddings).

    >>> q, k = torch.randn(2, 8, 5, 64), torch.randn(2, 2, 5, 64)
    >>> q, k = Rotary(theta=500_000)(q, k, torch.arange(5), rotary_dim=32, convention="interleaved")
    >>> q.shape, k.shape
    (torch.Size([2, 8, 5, 64]), torch.Size([2, 2, 5, 64]))
    """

    name = "rope"
    paper = "arXiv 2104.09864"
    summary = "rotary embeddings, unscaled"

    theta: float | None = None

    def __post_init__(self) -> None:
        if self.theta is not None:
            require_number(self.name, "theta", self.theta, least=1, strictly=True)

    def base_theta(self, geometry: Geometry) -> float:
        return geometry.theta if self.theta is None else float(self.theta)

    def patched_length(self, geometry: Geometry) -> int | None:
        return geometry.trained_length or geometry.allowed_length

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        return inverse_frequencies(self.base_theta(geometry), geometry.rotary_dim), 1.0

    def stock(self, geometry: Geometry) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": self.base_theta(geometry)}
