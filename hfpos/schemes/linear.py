"""Position interpolation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, RopeScaling


@dataclass(frozen=True, kw_only=True)
class Linear(RopeScaling):
    """Position interpolation (PI): every frequency is divided by the factor `s`, i.e. position p is read as p / s.

    Paper: arXiv 2306.15595.

    >>> from hfpos.scheme import Geometry
    >>> model = Geometry(heads=8, head_dim=4, rotary_dim=4, theta=10000.0, trained_length=512, allowed_length=512)
    >>> Linear(factor=4).frequencies(model)
    (tensor([0.2500, 0.0025], dtype=torch.float64), 1.0)
    """

    name = "linear"
    aliases = ("pi",)
    paper = "arXiv 2306.15595"
    summary = "position interpolation: all frequencies divided by the factor"

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        return inverse_frequencies(geometry.theta, geometry.rotary_dim) / self.resolved_factor(geometry), 1.0

    def stock(self, geometry: Geometry) -> dict[str, Any]:
        return {"rope_type": "linear", "rope_theta": geometry.theta, "factor": self.resolved_factor(geometry)}
