"""NTK-aware scaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, RopeScaling


def ntk_theta(theta: float, alpha: float, rotary_dim: int) -> float:
    """The raised base `theta * alpha ** (d / (d - 2))`, which divides the lowest frequency by exactly `alpha`.

    >>> round(ntk_theta(10000.0, 4, 128))
    40890
    """
    return theta * alpha ** (rotary_dim / (rotary_dim - 2))


@dataclass(frozen=True, kw_only=True)
class Ntk(RopeScaling):
    """NTK-aware scaling: the base becomes `theta * s ** (d / (d - 2))`; high frequencies stay, low ones are interpolated.

    Source: the "NTK-aware scaled RoPE" note of 2023, described in YaRN, arXiv 2309.00071, section 3.1. Stored as a plain
    `rope_theta`, so every server reads it.
    """

    name = "ntk"
    paper = "arXiv 2309.00071 (3.1)"
    summary = "NTK-aware: a raised base; high frequencies kept, low ones interpolated"

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        return inverse_frequencies(self._theta(geometry), geometry.rotary_dim), 1.0

    def stock(self, geometry: Geometry) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": self._theta(geometry)}

    def _theta(self, geometry: Geometry) -> float:
        return ntk_theta(geometry.theta, self.resolved_factor(geometry), geometry.rotary_dim)
