"""Adjusted base frequency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, Rope, require_length, require_number


@dataclass(frozen=True, kw_only=True)
class Abf(Rope):
    """Adjusted base frequency (ABF): a larger rotary base, meant to be fine-tuned.

    Paper: Effective Long-Context Scaling of Foundation Models, arXiv 2309.16039 (theta 500,000).

    Args:
        theta: the new base, > 1.
        target_length: the context length in tokens that the model is to be tuned for; the model's own unless given.
    """

    name = "abf"
    paper = "arXiv 2309.16039"
    summary = "a larger rotary base, for fine-tuning"

    theta: float = 500_000.0
    target_length: int | None = None

    def __post_init__(self) -> None:
        require_number(self.name, "theta", self.theta, least=1, strictly=True)
        if self.target_length is not None:
            require_length(self.name, "target_length", self.target_length)

    def base_theta(self, geometry: Geometry) -> float:
        return float(self.theta)

    def patched_length(self, geometry: Geometry) -> int | None:
        return self.target_length or geometry.trained_length or geometry.allowed_length

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        return inverse_frequencies(self.base_theta(geometry), geometry.rotary_dim), 1.0

    def stock(self, geometry: Geometry) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": self.base_theta(geometry)}
