"""Shaw's relative positions: the query meets a learned vector for each distance."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy
import torch

from hfpos.scheme import Bias, Geometry, PatchError, require_count, require_length


@dataclass(frozen=True, kw_only=True)
class Shaw(Bias):
    """Shaw's relative keys: `q_i . a[clip(j - i, -m, m)] / sqrt(d)`, with a learned table of 2 m + 1 vectors that all heads share.

    Paper: Self-Attention with Relative Position Representations, arXiv 1803.02155, section 3; each layer has its own table.

    Deviations: keys only; the paper also adds vectors to the values, and finds that those of the keys suffice. The table starts at
    zero, where the paper's code draws it at random: the model starts without positions, alike in every run.

    Args:
        max_distance: m in tokens; from there on all distances share a vector. The paper's value is 16.
        head_dim: d, the width of a head, for use without a model where it cannot be told from the queries.
    """

    name = "shaw"
    paper = "arXiv 1803.02155"
    summary = "a learned vector for each distance, met by the query"
    relative = False
    learned = True
    reads_query = True

    max_distance: int = 16
    head_dim: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        require_length(self.name, "max_distance", self.max_distance)

    @property
    def two_sided(self) -> bool:
        return True

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        if self.head_dim not in (None, geometry.head_dim):
            raise PatchError(
                f"shaw: it was made for head_dim={self.head_dim}, heads here have {geometry.head_dim} dimensions; leave head_dim out"
            )

    def alone(self, head_dim: int | None = None) -> Geometry:
        head_dim = self.head_dim if head_dim is None else head_dim
        if head_dim is None:
            raise PatchError("shaw: how wide a head is is not known; pass it, Shaw(num_heads, head_dim=64)")
        require_count(self.name, "head_dim", head_dim)
        return super().alone(head_dim)

    def weights(self, geometry: Geometry) -> dict[str, torch.Tensor]:
        """`table` (2 * max_distance + 1, D), zeros; row r is for a key `r - max_distance` tokens behind the query."""
        return {"table": torch.from_numpy(numpy.zeros((2 * self.max_distance + 1, geometry.head_dim)))}

    def formula(
        self,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        weights: dict[str, torch.Tensor],
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bias (B, H, Q, K) of scaled queries (B, H, Q, D) at (B or 1, Q) and keys at (B or 1, K) positions, in the table's dtype.

        >>> table, query = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[[0.5], [10.0]]])
        >>> Shaw(max_distance=1).bias(torch.tensor([0, 1]), torch.tensor([0, 1, 2]), {"table": table}, query)
        tensor([[[ 1.,  2.,  2.],
                 [10., 20., 40.]]])
        """
        table, m = weights["table"], self.max_distance
        if query is None or query.shape[-1] != table.shape[-1]:
            found = None if query is None else tuple(query.shape)
            raise PatchError(
                f"shaw: query has shape {found}; expected heads of {table.shape[-1]} dimensions, as the table has"
            )
        scores = query.to(table.dtype) @ table.T
        rows = (k_positions[:, None, None, :] - q_positions[:, None, :, None]).clamp(-m, m) + m
        batch, heads = max(rows.shape[0], scores.shape[0]), scores.shape[1]
        return scores.expand(batch, -1, -1, -1).gather(-1, rows.expand(batch, heads, -1, -1))
