"""Functional interpolation of relative positions: a small learned function of how far back a key is, for its query."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from hfpos.constant import exact
from hfpos.scheme import Bias, Geometry, require_count, require_number


EPSILON = 1e-6  # the authors' guard against a division by zero


@dataclass(frozen=True, kw_only=True)
class Fire(Bias):
    """FIRE: `f(x)` with `x = log(1 + |c| d) / (log(1 + |c| max(i, |L|)) + 1e-6)`, d = i - j the distance, i the query's position from 0.

    f is a learned network 1 -> hidden -> heads with a ReLU. x stays within 0 .. 1 at any length: 1 is the start of the text, or L
    tokens back where the text is shorter. c and L are learned too, L as a multiple of `threshold`, so that its steps are of its size.

    Paper: Functional Interpolation for Relative Positions Improves Long Context Transformers, arXiv 2310.04418; each layer has its own.

    Causal attention only: the paper defines the bias for keys up to the query, whose own position is the most that a distance can be.
    Behind it that measure is gone, and authors who ran FIRE there did not agree (distance 0, or |d|, which leaves 0 .. 1). It is refused.

    Deviations: d is 0 for a key behind its query, which the mask hides. The network starts in the range of torch's
    `Linear`, drawn by Python's generator from seed 0: the same in all layers, processes and runs.

    Args:
        hidden: width of the hidden layer; the paper's value is 32.
        c: initial value of c, > 0.
        threshold: initial value of L in tokens, > 0.
    """

    name = "fire"
    paper = "arXiv 2310.04418"
    summary = "a learned function of the distance relative to the query's position"
    relative = False
    learned = True

    hidden: int = 32
    c: float = 0.1
    threshold: float = 512.0

    def __post_init__(self) -> None:
        require_count(self.name, "hidden", self.hidden)
        require_number(self.name, "c", self.c, least=0, strictly=True)
        require_number(self.name, "threshold", self.threshold, least=0, strictly=True)

    def weights(self, geometry: Geometry) -> dict[str, torch.Tensor]:
        """`c` and `multiplier` of the threshold (1,), and the network's weights and biases in the shapes of torch's `Linear`."""
        draw = random.Random(0).random

        def uniform(count: int, fan_in: int) -> torch.Tensor:
            return exact([(2 * draw() - 1) * fan_in**-0.5 for _ in range(count)])

        return {
            "c": exact([self.c]),
            "multiplier": exact([1.0]),
            "hidden_weight": uniform(self.hidden, 1)[:, None],
            "hidden_bias": uniform(self.hidden, 1),
            "output_weight": uniform(geometry.heads * self.hidden, self.hidden).view(geometry.heads, self.hidden),
            "output_bias": uniform(geometry.heads, self.hidden),
        }

    def formula(
        self,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        weights: dict[str, torch.Tensor],
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bias (B, H, Q, K) of queries at (B, Q) and keys at (B, K) positions, in the dtype of the weights.

        >>> ones = {name: torch.ones(1) for name in ("c", "multiplier", "hidden_bias", "output_bias")}
        >>> ones |= {name: torch.ones(1, 1) for name in ("hidden_weight", "output_weight")}
        >>> Fire(hidden=1, threshold=2).bias(torch.tensor([8]), torch.tensor([0, 6, 8]), ones)  # 2 + log(1 + d) / log(1 + 8)
        tensor([[[3.0000, 2.5000, 2.0000]]])
        """
        c, threshold = weights["c"].abs(), weights["multiplier"].abs() * self.threshold
        i, j = q_positions[:, :, None], k_positions[:, None, :]
        reach = torch.maximum(i.to(c.dtype), threshold)
        x = torch.log1p(c * (i - j).clamp(min=0).to(c.dtype)) / (torch.log1p(c * reach) + EPSILON)
        # (B, hidden, Q * K): about as large as the bias, and the matrix product leaves the heads in front
        hidden = torch.addcmul(
            weights["hidden_bias"][:, None], weights["hidden_weight"], x.flatten(1)[:, None]
        ).relu_()
        heads = weights["output_weight"] @ hidden + weights["output_bias"][:, None]
        return heads.unflatten(-1, x.shape[1:])
