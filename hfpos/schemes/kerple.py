"""Kernelised relative positions: biases that fall with the logarithm or with a power of the distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from hfpos.constant import exact
from hfpos.scheme import Bias, Geometry, PatchError, require_choice, require_number
from hfpos.schemes._per_head import check_heads, numbers_of_heads
from hfpos.schemes.alibi import alibi_slopes


@dataclass(frozen=True, kw_only=True)
class Kerple(Bias):
    """KERPLE: `-r1 * log(1 + r2 * |i - j|)`, or `-r1 * |i - j| ** r2`, with r1 and r2 learned for each head.

    Paper: Kernelized Relative Positional Embedding for Length Extrapolation, arXiv 2205.09921. As there and in the authors' code, all
    layers have the same r1 and r2.

    Deviations: r1, r2 > 0 and, for `power`, r2 <= 2 hold by parametrisation (softplus, twice a sigmoid), where the authors' code
    clamps after each step and keeps a distance of 0.01 from 0. The authors draw the initial values at random, from (0, 2) and (0, 1),
    which other people found unstable; here they are the same every time: r1 the slopes of ALiBi and r2 = 1, so that `power`
    starts as ALiBi and `log` as the gentler curve with the same slope at distance 0.

    Args:
        kind: `log`, the paper's best, or `power`.
        r1: initial value, > 0: one for all heads or one for each; ALiBi's slopes unless given.
        r2: the same, > 0; for `power` <= 2. At 2 itself, the end of the sigmoid, it does not learn.
    """

    name = "kerple"
    paper = "arXiv 2205.09921"
    summary = "learned penalties that fall with the logarithm or a power of the distance"
    learned = True
    shared = True

    kind: str = "log"
    r1: float | Sequence[float] | None = None
    r2: float | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        require_choice(self.name, "kind", self.kind, ("log", "power"))
        for name in ("r1", "r2"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (int, float)):
                object.__setattr__(self, name, numbers_of_heads(self.name, name, value, strictly=True))
            for number in self.per_head(name, 1):
                require_number(self.name, name, number, least=0, strictly=True)
                if name == "r2" and self.kind == "power" and number > 2:
                    raise PatchError(f"kerple: r2={number!r} is not usable; expected at most 2 where kind='power'")

    @property
    def two_sided(self) -> bool:
        return True

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        for name in ("r1", "r2"):
            check_heads(self.name, name, self.per_head(name, geometry.heads), geometry.heads)

    def per_head(self, name: str, heads: int) -> list[float]:
        """The initial values of `r1` or `r2`, one for each head."""
        value = getattr(self, name)
        if value is None:
            return alibi_slopes(heads)
        return [value] * heads if isinstance(value, (int, float)) else value

    def weights(self, geometry: Geometry) -> dict[str, torch.Tensor]:
        """`raw_r1` and `raw_r2` (H,): any real number is a legal value; `positive` maps them to r1 and r2."""
        r1, r2 = (exact(self.per_head(name, geometry.heads)) for name in ("r1", "r2"))
        raw_r2 = r2.log() - (2 - r2).clamp(min=1e-12).log() if self.kind == "power" else _inverse_softplus(r2)
        return {"raw_r1": _inverse_softplus(r1), "raw_r2": raw_r2}

    def positive(self, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """r1 and r2, each (H,), as they stand in the formula.

        >>> r1, r2 = Kerple(r1=0.5, r2=2).positive({"raw_r1": torch.tensor([0.0]), "raw_r2": torch.tensor([1.0])})
        >>> r1, r2
        (tensor([0.6931]), tensor([1.3133]))
        """
        raw_r2 = weights["raw_r2"]
        return softplus(weights["raw_r1"]), 2 * raw_r2.sigmoid() if self.kind == "power" else softplus(raw_r2)

    def formula(
        self,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        weights: dict[str, torch.Tensor],
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bias (B, H, Q, K) of queries at (B, Q) and keys at (B, K) positions, in the dtype of the weights.

        >>> Kerple(2, kind="power", r1=[1, 0.5], r2=1).bias(torch.tensor([2]), torch.arange(3))[:, 0]
        tensor([[-2.0000, -1.0000, -0.0000],
                [-1.0000, -0.5000, -0.0000]])
        """
        r1, r2 = (number[:, None, None] for number in self.positive(weights))
        distance = (q_positions[:, None, :, None] - k_positions[:, None, None, :]).abs().to(r1.dtype)
        return -r1 * (distance**r2 if self.kind == "power" else torch.log1p(r2 * distance))


def _inverse_softplus(values: torch.Tensor) -> torch.Tensor:
    return values + torch.log(-torch.expm1(-values))
