"""Attention with linear biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hfpos.constant import exact
from hfpos.scheme import Bias, Geometry, PatchError, did_you_mean, require_number
from hfpos.schemes._per_head import check_heads, numbers_of_heads


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

    For attention that is not causal the paper's authors describe three forms (github.com/ofirpress/attention_with_linear_biases,
    issue 5): the same slope both ways, two slopes, and heads that look one way each.

    Args:
        num_heads: for use without a model: `Alibi(8).bias(q_positions, k_positions)`.
        slopes: one slope for each head; the paper's rule unless given.
        factor: the slopes are divided by it, i.e. distances are interpolated (the ALiBi form of PI), >= 1.
        bidirectional: True: the distance is `|i - j|`; the same under a causal mask. "split": the first half of the heads sees the keys
            up to its query only, the second half those from it on, with the slopes of the paper's rule for half as many heads in each;
            for models that attend both ways.
        slopes_ahead: one slope for each head for the keys behind the query, j > i, whose bias is `-slopes_ahead_h * (j - i)`.
    """

    name = "alibi"
    paper = "arXiv 2108.12409"
    summary = "a penalty on the logits, linear in the distance"

    slopes: Sequence[float] | None = None
    factor: float = 1.0
    bidirectional: bool | str = False
    slopes_ahead: Sequence[float] | None = None

    def __post_init__(self) -> None:
        require_number(self.name, "factor", self.factor, least=1)
        if not isinstance(self.bidirectional, bool) and self.bidirectional != "split":
            hint = did_you_mean(str(self.bidirectional), ("True", "False", "split"))
            raise PatchError(f"alibi: bidirectional={self.bidirectional!r} is unknown: {hint}")
        if self.bidirectional and self.slopes_ahead is not None:
            raise PatchError(
                f"alibi: both bidirectional={self.bidirectional!r} and slopes_ahead were given; slopes_ahead is for both ways already: leave "
                "bidirectional out"
            )
        for name in ("slopes", "slopes_ahead"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, numbers_of_heads(self.name, name, getattr(self, name)))

    @property
    def two_sided(self) -> bool:
        return bool(self.bidirectional) or self.slopes_ahead is not None

    @property
    def needs_both_ways(self) -> bool:
        return self.bidirectional == "split"

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        for name in ("slopes", "slopes_ahead"):
            if getattr(self, name) is not None:
                check_heads(self.name, name, getattr(self, name), geometry.heads)
        if self.bidirectional == "split" and geometry.heads % 2:
            raise PatchError(
                f"alibi: bidirectional='split' needs an even number of heads, the model has {geometry.heads}; use bidirectional=True"
            )

    def patched_length(self, geometry: Geometry) -> int | None:
        length = geometry.trained_length or geometry.allowed_length
        return None if length is None else round(self.factor * length)

    def head_slopes(self, heads: int) -> list[float]:
        """The slopes in use: the given ones or the paper's, divided by the factor."""
        slopes = self.slopes
        if slopes is None:
            slopes = alibi_slopes(heads // 2) * 2 if self.bidirectional == "split" else alibi_slopes(heads)
        return [slope / self.factor for slope in slopes]

    def weights(self, geometry: Geometry) -> dict[str, torch.Tensor]:
        """`slopes` (H,), and where they differ behind the query `slopes_ahead` (H,)."""
        weights = {"slopes": exact(self.head_slopes(geometry.heads))}
        if self.bidirectional == "split":  # an infinite slope hides a key
            half = geometry.heads // 2
            ahead = [math.inf] * half + self.head_slopes(geometry.heads)[half:]
            behind = self.head_slopes(geometry.heads)[:half] + [math.inf] * half
            weights = {"slopes": exact(behind), "slopes_ahead": exact(ahead)}
        elif self.slopes_ahead is not None:
            weights["slopes_ahead"] = exact([slope / self.factor for slope in self.slopes_ahead])
        return weights

    def formula(
        self,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        weights: dict[str, torch.Tensor],
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bias (B, H, Q, K) of queries at (B, Q) and keys at (B, K) positions, in the dtype of the slopes (H,).

        >>> Alibi(bidirectional=True).bias(torch.tensor([1]), torch.arange(4), {"slopes": torch.tensor([0.5])})
        tensor([[[-0.5000, -0.0000, -0.5000, -1.0000]]])
        >>> Alibi(2, bidirectional="split").bias(torch.tensor([1]), torch.arange(3))[:, 0] * 256
        tensor([[-1., -0., -inf],
                [-inf, -0., -1.]])
        """
        slopes = weights["slopes"][:, None, None]
        ahead = (k_positions[:, None, None, :] - q_positions[:, None, :, None]).to(slopes.dtype)
        if not self.two_sided:
            return slopes * ahead
        if "slopes_ahead" not in weights:
            return -slopes * ahead.abs()
        other = weights["slopes_ahead"][:, None, None]
        # not a product of infinite slopes with zero, which is not a number
        return -torch.where(ahead > 0, other, torch.where(ahead < 0, slopes, 0.0)) * ahead.abs()

    def factors(
        self, q_positions: torch.Tensor, k_positions: torch.Tensor, weights: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`-m (i - j)` is `m j`, but for what depends on i alone; what treats both sides of the query alike does not separate."""
        if self.two_sided:
            return None
        slopes = weights["slopes"]
        return slopes[None, :, None, None], k_positions[:, None, :, None].to(slopes.dtype)
