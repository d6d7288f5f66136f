"""Attention with linear biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hfpos.constant import exact
from hfpos.scheme import Bias, Geometry, PatchError, require_number


def alibi_slopes(heads: int) -> list[float]:
    """The slope of each head: `2 ** (-8 h / heads)`, h = 1 .. heads, where `heads` is a power of two.

    Otherwise the slopes of the next lower power of two come first, then every other slope of the next higher one.
    Paper: arXiv 2108.12409, section 3 and the authors' code.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> [round(slope, 4) for slope in alibi_slopes(6)]
    [0.25, 0.0625, 0.0156, 0.0039, 0.5, 0.125]
    """
    lower = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * h / lower) for h in range(1, lower + 1)]
    return slopes + [2.0 ** (-4 * h / lower) for h in range(1, 2 * (heads - lower), 2)]


@dataclass(frozen=True, kw_only=True)
class Alibi(Bias):
    """ALiBi: `-m_h * (i - j)` is added to the logit of query i and key j; no other position information.

    Paper: Train Short, Test Long, arXiv 2108.12409. On BLOOM these are the trained positions, and `factor` extends them.

    Args:
        slopes: one slope for each head; the paper's rule unless given.
        factor: the slopes are divided by it, i.e. distances are interpolated (the ALiBi form of PI), >= 1.
        bidirectional: use the distance `|i - j|`; the same under a causal mask.
    """

    name = "alibi"
    paper = "arXiv 2108.12409"
    summary = "a penalty on the logits, linear in the distance"

    slopes: Sequence[float] | None = None
    factor: float = 1.0
    bidirectional: bool = False

    def __post_init__(self) -> None:
        require_number(self.name, "factor", self.factor, least=0, strictly=True)
        require_number(self.name, "factor", self.factor, least=1)
        if self.slopes is not None:
            object.__setattr__(self, "slopes", [float(slope) for slope in self.slopes])
            for slope in self.slopes or ():
                require_number(self.name, "slopes", slope, least=0)

    @property
    def two_sided(self) -> bool:
        return self.bidirectional

    def check(self, geometry: Geometry) -> None:
        if self.slopes is not None and len(self.slopes) != geometry.heads:
            raise PatchError(
                f"alibi: {len(self.slopes)} slopes were given, the model has {geometry.heads} attention heads"
            )

    def patched_length(self, geometry: Geometry) -> int | None:
        length = geometry.trained_length or geometry.allowed_length
        return None if length is None else round(self.factor * length)

    def head_slopes(self, heads: int) -> list[float]:
        """The slopes in use: the given ones or the paper's, divided by the factor."""
        return [slope / self.factor for slope in (alibi_slopes(heads) if self.slopes is None else self.slopes)]

    def weights(self, geometry: Geometry) -> dict[str, torch.Tensor]:
        return {"slopes": exact(self.head_slopes(geometry.heads))}

    def bias(
        self,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        weights: dict[str, torch.Tensor],
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bias (B, H, Q, K) of queries at (B, Q) and keys at (B, K) positions, in the dtype of the slopes (H,).

        >>> positions = torch.arange(3)[None]
        >>> Alibi().bias(positions, positions, {"slopes": torch.tensor([0.5])})[0, 0, 2].tolist()
        [-1.0, -0.5, 0.0]
        """
        slopes = weights["slopes"]
        ahead = k_positions[:, None, None, :] - q_positions[:, None, :, None]
        if self.bidirectional:
            ahead = -ahead.abs()
        return slopes[:, None, None] * ahead.to(slopes.dtype)

    def factors(
        self, q_positions: torch.Tensor, k_positions: torch.Tensor, weights: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`-m (i - j)` is `m j`, but for what depends on i alone; `-m |i - j|` does not separate."""
        if self.bidirectional:
            return None
        slopes = weights["slopes"]
        return slopes[None, :, None, None], k_positions[:, None, :, None].to(slopes.dtype)
