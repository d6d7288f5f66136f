"""YaRN: NTK-by-parts frequencies and an attention temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hfpos.constant import exact
from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, PatchError, RopeScaling, require_flag, require_number


def temperature(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor on cos and sin, `0.1 * weight * ln(factor) + 1`, and 1 where nothing is extended."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def ramp(geometry: Geometry, original_length: int, beta_fast: float, beta_slow: float, truncate: bool) -> torch.Tensor:
    """How much of each frequency is interpolated: (rotary_dim / 2,) float64 from 0 (kept) to 1 (divided by the factor).

    Dimension pair i turns `original_length * inv_freq[i] / (2 pi)` times over the original context; pairs that turn more than
    `beta_fast` times are kept, fewer than `beta_slow` times interpolated, linear in i between. `truncate` rounds the two
    bounds outwards to whole pairs, as the authors' code does.
    """
    dim, theta = geometry.rotary_dim, geometry.theta

    def pair_turning(rotations: float) -> float:
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_turning(beta_fast), pair_turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the authors' guard against a division by zero
    return exact([min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dim // 2)])


def blend(geometry: Geometry, factor: float, interpolated: torch.Tensor) -> torch.Tensor:
    """The arithmetic mix of kept and divided frequencies: (rotary_dim / 2,) float64."""
    kept = inverse_frequencies(geometry.theta, geometry.rotary_dim)
    return kept * (1 - interpolated) + kept / factor * interpolated


@dataclass(frozen=True, kw_only=True)
class YarnRamp(RopeScaling):
    """What YaRN and NTK-by-parts share: the ramp between kept and interpolated frequencies.

    Args:
        beta_fast: pairs that turn more often than this over the original context are kept.
        beta_slow: pairs that turn less often than this are divided by the factor.
        truncate: round the bounds of the ramp to whole pairs, as the authors' code and Transformers do.
    """

    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.name, "beta_fast", self.beta_fast, least=0, strictly=True)
        require_number(self.name, "beta_slow", self.beta_slow, least=0, strictly=True)
        if self.beta_fast < self.beta_slow:
            raise PatchError(
                f"{self.name}: beta_fast={self.beta_fast} is below beta_slow={self.beta_slow}; beta_fast counts the rotations "
                "above which a frequency is kept, beta_slow those below which it is interpolated"
            )
        require_flag(self.name, "truncate", self.truncate)

    def attention_scale(self, geometry: Geometry) -> float:
        """The factor on cos and sin; its square multiplies every logit."""
        return 1.0

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        interpolated = ramp(geometry, self.resolved_original(geometry), self.beta_fast, self.beta_slow, self.truncate)
        return blend(geometry, self.resolved_factor(geometry), interpolated), self.attention_scale(geometry)

    def stock(self, geometry: Geometry) -> dict[str, Any]:
        return {
            "rope_type": "yarn",
            "rope_theta": geometry.theta,
            "factor": self.resolved_factor(geometry),
            "original_max_position_embeddings": self.resolved_original(geometry),
            "beta_fast": float(self.beta_fast),
            "beta_slow": float(self.beta_slow),
            "truncate": self.truncate,
            "attention_factor": self.attention_scale(geometry),
        }


@dataclass(frozen=True, kw_only=True)
class Yarn(YarnRamp):
    """YaRN: high frequencies kept, low ones divided by `s`, a ramp between, and cos/sin times `0.1 ln(s) + 1`.

    Paper: arXiv 2309.00071. Deviates: the ramp is linear in the pair index and its bounds are truncated, as in the authors'
    code and in Transformers; the paper's text ramps over the number of rotations.

    Args:
        attention_factor: the factor on cos and sin itself; it wins over every other way to set it.
        mscale, mscale_all_dim: DeepSeek's form, `t(mscale) / t(mscale_all_dim)` with `t(m) = 0.1 m ln(s) + 1`; used where
            both are given and non-zero, as in Transformers.

    >>> from hfpos.scheme import Geometry
    >>> llama = Geometry(heads=32, head_dim=128, rotary_dim=128, theta=1e4, trained_length=4096, allowed_length=4096)
    >>> inv_freq, scale = Yarn(factor=16).frequencies(llama)
    >>> round(scale, 5), inv_freq[0].item(), round(1e-4 / inv_freq[-1].item(), 2)
    (1.27726, 1.0, 13.86)
    """

    name = "yarn"
    paper = "arXiv 2309.00071"
    summary = "NTK-by-parts frequencies plus an attention temperature"

    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_factor is not None:
            require_number(self.name, "attention_factor", self.attention_factor, least=0, strictly=True)
        for field in ("mscale", "mscale_all_dim"):
            if getattr(self, field) is not None:
                require_number(self.name, field, getattr(self, field), least=0)
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise PatchError(
                f"yarn: mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim} take effect only together; give both, "
                "or attention_factor"
            )

    def attention_scale(self, geometry: Geometry) -> float:
        factor = self.resolved_factor(geometry)
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.mscale and self.mscale_all_dim:
            return temperature(factor, self.mscale) / temperature(factor, self.mscale_all_dim)
        return temperature(factor)
