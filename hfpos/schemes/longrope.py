"""LongRoPE: one divisor for each frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, PatchError, Rope, require_number
from hfpos.schemes._length_aware import LengthAwareRope


@dataclass(frozen=True, kw_only=True)
class LongRope(LengthAwareRope):
    """LongRoPE: frequency i is divided by `short_factor[i]` up to the original length and by `long_factor[i]` beyond it.

    cos and sin are multiplied by `attention_factor`, at every length, as Transformers and Phi-3 do; by default
    `sqrt(1 + ln(s) / ln(original))` with `s` the factor.

    Paper: arXiv 2402.13753.

    Args:
        short_factor, long_factor: rotary_dim / 2 divisors each, > 0.
        attention_factor: the factor on cos and sin.
    """

    name = "longrope"
    paper = "arXiv 2402.13753"
    summary = "searched divisors for each frequency, one set for short and one for long texts"

    short_factor: Sequence[float]
    long_factor: Sequence[float]
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("short_factor", "long_factor"):
            values = [float(value) if isinstance(value, int) else value for value in getattr(self, field)]
            for value in values:
                require_number(self.name, field, value, least=0, strictly=True)
            object.__setattr__(self, field, values)
        if self.attention_factor is not None:
            require_number(self.name, "attention_factor", self.attention_factor, least=0, strictly=True)

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        for field in ("short_factor", "long_factor"):
            if len(getattr(self, field)) != geometry.rotary_dim // 2:
                raise PatchError(
                    f"longrope: {field} has {len(getattr(self, field))} entries, the model has {geometry.rotary_dim // 2} frequencies"
                )

    def attention_scale(self, geometry: Geometry) -> float:
        """The factor on cos and sin."""
        if self.attention_factor is not None:
            return float(self.attention_factor)
        original = self.resolved_original(geometry)
        factor = self.patched_length(geometry) / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

    def patched_length(self, geometry: Geometry) -> int:
        if not self._target_given and geometry.allowed_length is not None:
            return max(geometry.allowed_length, self.resolved_original(geometry))
        return super().patched_length(geometry)

    def frequencies_at(self, geometry: Geometry, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        unscaled = inverse_frequencies(geometry.theta, geometry.rotary_dim).to(lengths.device)
        short, long = (unscaled / unscaled.new_tensor(divisors) for divisors in (self.short_factor, self.long_factor))
        is_long = (lengths > self.resolved_original(geometry))[..., None]
        scale = torch.ones_like(lengths, dtype=torch.float64) * self.attention_scale(geometry)
        return torch.where(is_long, long, short), scale

    def few_sets(self, geometry: Geometry) -> tuple[torch.Tensor, ...] | None:
        original = self.resolved_original(geometry)
        return torch.tensor(original), torch.tensor(original + 1)

    def stock(self, geometry: Geometry) -> dict[str, Any]:
        original = self.resolved_original(geometry)
        factors = list(self.long_factor if self.patched_length(geometry) > original else self.short_factor)
        return {
            "rope_type": "longrope",
            "rope_theta": geometry.theta,
            "factor": self.patched_length(geometry) / original,
            "original_max_position_embeddings": original,
            # one set at every length: that is what pinning means
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": self.attention_scale(geometry),
        }


def as_divisors(scheme: Rope, geometry: Geometry) -> dict[str, Any] | None:
    """Any fixed frequencies as stock `longrope` parameters, for configs that take no other type; None where a pair stands still."""
    inv_freq, scale = scheme.frequencies(geometry)
    if geometry.trained_length is None or not inv_freq.all():
        return None
    divisors = (inverse_frequencies(geometry.theta, geometry.rotary_dim) / inv_freq).tolist()
    length = scheme.patched_length(geometry)
    same = LongRope(short_factor=divisors, long_factor=divisors, attention_factor=scale, target_length=length)
    return same.stock(geometry)
