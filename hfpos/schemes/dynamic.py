"""Dynamic NTK scaling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hfpos.constant import exact
from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry
from hfpos.schemes._length_aware import LengthAwareRope
from hfpos.schemes.ntk import ntk_theta


@dataclass(frozen=True, kw_only=True)
class Dynamic(LengthAwareRope):
    """Dynamic NTK: at length L the base is `theta * (f L / original - (f - 1)) ** (d / (d - 2))`, unscaled up to the original length.

    `f` is the factor, 1 unless given. A pure function of the length: nothing is remembered between calls, and rows of a batch do
    not influence each other.

    Source: the "dynamic NTK" note of 2023, described in YaRN, arXiv 2309.00071, section 3.3. Deviates from Transformers'
    `dynamic` in that keys follow a change of base (see `cache`).
    """

    name = "dynamic"
    paper = "arXiv 2309.00071 (3.3)"
    summary = "NTK-aware with the base raised as the text grows"

    def frequencies_at(self, geometry: Geometry, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        original, dim, factor = self.resolved_original(geometry), geometry.rotary_dim, self.resolved_factor(geometry)
        alpha = (factor * lengths.double() / original - (factor - 1)).clamp(min=1.0)
        # inv_freq_i = (theta * alpha^(d/(d-2)))^(-2i/d), written as the unscaled one times a power of alpha
        pair = exact([-2 * i / (dim - 2) for i in range(dim // 2)]).to(lengths.device)
        unscaled = inverse_frequencies(geometry.theta, dim).to(lengths.device)
        return unscaled * alpha[..., None] ** pair, torch.ones_like(alpha)

    def stock(self, geometry: Geometry) -> dict[str, Any] | None:
        factor = self.resolved_factor(geometry)
        alpha = max(factor * self.patched_length(geometry) / self.resolved_original(geometry) - (factor - 1), 1.0)
        return {"rope_type": "default", "rope_theta": ntk_theta(geometry.theta, alpha, geometry.rotary_dim)}
