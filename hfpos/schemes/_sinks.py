"""What LM-Infinite and StreamingLLM share: a query sees the last tokens and the first ones, and nothing between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hfpos.scheme import Geometry, PatchError, require_length
from hfpos.schemes._remapping import Branch, Remapping


@dataclass(frozen=True, kw_only=True)
class Sinks(Remapping):
    """Base of the schemes with a window and sinks. The first `sinks` tokens are those at positions below it, of each document.

    Args:
        window: tokens that are seen at their own distance, the query's own among them.
        sinks: tokens at the beginning that are always seen.
    """

    hides: ClassVar[bool] = True

    window: int | None = None
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            require_length(self.name, "window", self.window)
        require_length(self.name, "sinks", self.sinks)

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        original, window = self.resolved_original(geometry), self.resolved_window(geometry)
        if not 1 <= window <= self._longest(original):
            raise PatchError(
                f"{self.name}: a window of {window} tokens beside {self.sinks} sinks does not fit the original length of {original} tokens; "
                f"expected a window of 1 to {self._longest(original)}"
            )

    def resolved_window(self, geometry: Geometry) -> int:
        """How many tokens are seen at their own distance."""
        return self.window if self.window is not None else self._longest(self.resolved_original(geometry))

    def branches(self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor) -> tuple[Branch, ...]:
        edge = queries - self.resolved_window(geometry) + 1
        query, key = self.sink_places(geometry, queries, keys)
        return Branch(edge, None, queries, keys), Branch(None, edge.clamp(max=self.sinks), query, key)

    def sink_places(
        self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where queries (B, Q) and sinks among the keys (B, K) stand for each other, when they are a window or more apart."""
        raise TypeError(f"{type(self).__name__} does not say where it sees its sinks")

    def unchanged(self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return (queries.amax(-1) - keys.amin(-1) < self.resolved_window(geometry)).all()

    def _longest(self, original: int) -> int:
        """The longest window on a model of this original length."""
        return original
