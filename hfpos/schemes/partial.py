"""Rotation of a fraction of the dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, PatchError, Rope, require_number


@dataclass(frozen=True, kw_only=True)
class Partial(Rope):
    """Partial rotary embedding (p-RoPE): the fastest `fraction` of the frequencies rotate, the others stand still.

    The dimension pairs of the trained model keep their frequencies, so a pretrained model loses only its slow rotations.

    Paper: Round and Round We Go, arXiv 2410.06205, section 6.

    Args:
        fraction: how much of the rotated dimensions goes on rotating, in (0, 1].
    """

    name = "partial"
    paper = "arXiv 2410.06205"
    summary = "only the fastest fraction of the frequencies rotates"

    fraction: float = 0.5

    def __post_init__(self) -> None:
        require_number(self.name, "fraction", self.fraction, least=0, strictly=True)
        if self.fraction > 1:
            raise PatchError(f"partial: fraction={self.fraction} is not usable; expected a number in (0, 1]")

    def check(self, geometry: Geometry) -> None:
        if self._kept(geometry) < 1:
            raise PatchError(
                f"partial: fraction={self.fraction} of {geometry.rotary_dim} rotary dimensions leaves no pair to rotate; raise it, "
                "or use 'nope'"
            )

    def patched_length(self, geometry: Geometry) -> int | None:
        return geometry.trained_length or geometry.allowed_length

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        inv_freq = inverse_frequencies(geometry.theta, geometry.rotary_dim)
        inv_freq[self._kept(geometry) :] = 0
        return inv_freq, 1.0

    def stock(self, geometry: Geometry) -> dict[str, Any] | None:
        if geometry.rotary_dim != geometry.head_dim:
            return None  # there `partial_rotary_factor` already names the model's own split of a head
        return {
            "rope_type": "proportional",
            "rope_theta": geometry.theta,
            "partial_rotary_factor": 2 * self._kept(geometry) / geometry.rotary_dim,
        }

    def _kept(self, geometry: Geometry) -> int:
        return int(self.fraction * geometry.rotary_dim // 2)
