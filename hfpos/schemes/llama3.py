"""The scaling of Llama 3.1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, PatchError, RopeScaling, require_number


@dataclass(frozen=True, kw_only=True)
class Llama3(RopeScaling):
    """Llama 3.1's scaling: wavelengths below `original / high_freq_factor` are kept, above `original / low_freq_factor` divided by
    the factor, and mixed between, linear in `original / wavelength`.

    Paper: The Llama 3 Herd of Models, arXiv 2407.21783; the formula is in the reference code of Llama 3.1.
    """

    name = "llama3"
    paper = "arXiv 2407.21783"
    summary = "Llama 3.1's smooth step between kept and interpolated wavelengths"

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.name, "low_freq_factor", self.low_freq_factor, least=0, strictly=True)
        require_number(self.name, "high_freq_factor", self.high_freq_factor, least=0, strictly=True)
        if self.high_freq_factor <= self.low_freq_factor:
            raise PatchError(
                f"llama3: high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor}"
            )

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        kept = inverse_frequencies(geometry.theta, geometry.rotary_dim)
        turns = self.resolved_original(geometry) * kept / (2 * math.pi)
        smooth = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return kept * smooth + kept / self.resolved_factor(geometry) * (1 - smooth), 1.0

    def stock(self, geometry: Geometry) -> dict[str, Any]:
        return {
            "rope_type": "llama3",
            "rope_theta": geometry.theta,
            "factor": self.resolved_factor(geometry),
            "original_max_position_embeddings": self.resolved_original(geometry),
            "low_freq_factor": float(self.low_freq_factor),
            "high_freq_factor": float(self.high_freq_factor),
        }
