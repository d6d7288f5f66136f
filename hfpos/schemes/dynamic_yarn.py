"""YaRN with the factor of the current length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry
from hfpos.schemes._length_aware import LengthAwareRope
from hfpos.schemes.yarn import Yarn, ramp


@dataclass(frozen=True, kw_only=True)
class DynamicYarn(LengthAwareRope):
    """Dynamic YaRN: YaRN with `s = max(1, L / original)` at length L, frequencies and temperature both from this `s`.

    Paper: arXiv 2309.00071, section 3.3. `factor` and `target_length` only say how far the model is meant to go.
    """

    name = "dynamic_yarn"
    paper = "arXiv 2309.00071 (3.3)"
    summary = "YaRN with the factor of the current length"

    def frequencies_at(self, geometry: Geometry, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        original = self.resolved_original(geometry)
        factor = (lengths.double() / original).clamp(min=1.0)
        interpolated = ramp(geometry, original, 32.0, 1.0, truncate=True).to(lengths.device)
        unscaled = inverse_frequencies(geometry.theta, geometry.rotary_dim).to(lengths.device)
        inv_freq = unscaled * (1 - interpolated) + unscaled / factor[..., None] * interpolated
        return inv_freq, 0.1 * factor.log() + 1.0

    def stock(self, geometry: Geometry) -> dict[str, Any]:
        return Yarn(
            factor=max(self.patched_length(geometry) / self.resolved_original(geometry), 1.0),
            original_length=self.original_length,
        ).stock(geometry)
