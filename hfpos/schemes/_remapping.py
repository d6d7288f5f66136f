"""What the schemes share that see keys from other places than those where they stand: Self-Extend, ReRoPE, dual chunk, LM-Infinite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, RopeScaling
from hfpos.schemes._alone import Alone


class Branch(NamedTuple):
    """One way in which queries see keys: which keys, and where the two then stand.

    A query sees the keys in this way whose position is `first` or more and less than `stop`. Branches of one scheme share no pair; a pair
    that is in none of them is not seen.

    Attributes:
        first, stop: (B, Q) integer; None for no bound.
        query, key: (B, Q) and (B, K), the positions that they are rotated by: integer, or float64.
    """

    first: torch.Tensor | None
    stop: torch.Tensor | None
    query: torch.Tensor
    key: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Remapping(Alone, RopeScaling):
    """Base of the schemes that rotate queries and keys by positions of their own choice, pair by pair, and train nothing.

    Frequencies stay those of the pretraining. Any length works; `factor` or `target_length` say what the config is to allow.

    Attributes:
        hides: some keys before a query are in none of its branches.
    """

    hides: ClassVar[bool] = False
    __call__ = Alone.attend  # type: ignore[assignment]

    @property
    def seam(self) -> str:
        return "score"

    def check(self, geometry: Geometry) -> None:
        self.resolved_original(geometry)
        if self.factor is not None or self.target_length is not None:
            super().check(geometry)

    def patched_length(self, geometry: Geometry) -> int | None:  # type: ignore[override]
        if self.factor is None and self.target_length is None:
            return geometry.allowed_length
        return super().patched_length(geometry)

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        return inverse_frequencies(geometry.theta, geometry.rotary_dim), 1.0

    def branches(self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor) -> tuple[Branch, ...]:
        """Every way in which queries at the positions `queries` (B, Q) see keys at `keys` (B, K), both int64."""
        raise TypeError(f"{type(self).__name__} does not define its branches")

    def unchanged(self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """A boolean: whether every query sees every key that is not behind it as it would without the scheme."""
        raise TypeError(f"{type(self).__name__} does not say what it leaves unchanged")

    def query_factor(self, geometry: Geometry, queries: torch.Tensor) -> torch.Tensor | None:
        """What queries at the positions `queries` (B, Q) are multiplied by: (B, Q) float64; None for nothing."""
        return None

    def distances(
        self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How far away a query at `queries` (B, Q) sees a key at `keys` (B, K): (B, Q, K) float64, and whether it sees it at all.

        Written out for pictures and checks; attention never makes it. That queries see no keys behind them is left to attention.
        """
        distance = torch.full((*queries.shape, keys.shape[-1]), torch.nan, dtype=torch.float64)
        seen = torch.zeros_like(distance, dtype=torch.bool)
        for branch in self.branches(geometry, queries, keys):
            here = inside(branch, keys[:, None])
            there = branch.query.double()[:, :, None] - branch.key.double()[:, None]
            distance, seen = torch.where(here, there, distance), seen | here
        return distance, seen


def inside(branch: Branch, keys: torch.Tensor, columns: slice = slice(None)) -> torch.Tensor:
    """Whether the queries in `columns` see keys at the positions `keys` (B, 1, K) in this branch: boolean (B, Q, K), or (B, 1, K)."""
    found = torch.ones_like(keys, dtype=torch.bool)
    if branch.first is not None:
        found = found & (keys >= branch.first[:, columns, None])
    if branch.stop is not None:
        found = found & (keys < branch.stop[:, columns, None])
    return found
