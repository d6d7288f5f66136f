"""Self-Extend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfpos.scheme import Geometry, PatchError, RopeScaling, require_length
from hfpos.schemes._remapping import Branch, Remapping


@dataclass(frozen=True, kw_only=True)
class SelfExtend(Remapping):
    """Self-Extend: keys fewer than `window` tokens away are seen at their own distance, those farther away at distances of groups.

    The query at position i and the key at position j are rotated by i and j where `i - j < window`, else by
    `i // group_size + window - window // group_size` and `j // group_size`. Frequencies stay those of the pretraining, nothing is trained,
    and a text no longer than the window is what it was.

    How far to extend is `group_size`, or `factor` or `target_length`, for which the smallest group is taken that reaches them:
    `group_size = ceil((target_length - window) / (original_length - window))`, so that the farthest distance,
    `window + (target_length - window) / group_size`, is at most the original length. The authors found that a larger group can do better, as the
    largest distances are the least trained. Both may be given, if the group reaches the target.

    Paper: Self-Extend, arXiv 2401.01325. Deviates from some of the authors' files in that every division rounds down, as in the
    paper and in their decoding; where the group divides the window there is no difference.

    Args:
        factor, target_length, original_length: as for every scaling of rotary embeddings.
        group_size: how many neighbouring positions become one, >= 2.
        window: tokens that are seen at their own distance; a quarter of the original length unless given, as in the authors' settings.

    >>> model = Geometry(heads=8, head_dim=4, rotary_dim=4, theta=10000.0, trained_length=4096, allowed_length=4096)
    >>> SelfExtend(target_length=15_800).resolved_group(model)
    5
    >>> SelfExtend(group_size=5).patched_length(model)
    16384
    >>> query, key, value = torch.ones(3, 1, 2, 9, 4).unbind()
    >>> SelfExtend(group_size=2, original_length=8)(query, key, value).shape
    torch.Size([1, 2, 9, 4])
    """

    name = "self_extend"
    paper = "arXiv 2401.01325"
    summary = "near keys at their own distance, far ones in groups; without training"

    group_size: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("group_size", "window"):
            if getattr(self, name) is not None:
                require_length(self.name, name, getattr(self, name))
        if self.group_size == 1:
            raise PatchError("self_extend: group_size=1 changes nothing; expected a group of 2 tokens or more")

    def check(self, geometry: Geometry) -> None:
        original, window = self.resolved_original(geometry), self.resolved_window(geometry)
        if window >= original:
            raise PatchError(
                f"self_extend: window={window} leaves no distance for the groups, as the original length is {original} tokens; pass a "
                f"window below it, e.g. {max(original // 4, 1)}"
            )
        if self.group_size is None:
            RopeScaling.check(self, geometry)
            if self.patched_length(geometry) == original:
                raise PatchError(
                    f"self_extend: a target of {original} tokens is the original length, where there is nothing to extend; pass a "
                    "factor above 1 or a longer target_length"
                )
        reached = self._reach(self.resolved_group(geometry), geometry)
        if self.patched_length(geometry) > reached:
            raise PatchError(
                f"self_extend: group_size={self.group_size} with a window of {window} reaches {reached} tokens, not the target of "
                f"{self.patched_length(geometry)}; expected a group_size of at least {self._smallest_group(geometry)}, or leave it out"
            )

    def patched_length(self, geometry: Geometry) -> int:
        if self.group_size is not None and self.factor is None and self.target_length is None:
            return self._reach(self.resolved_group(geometry), geometry)
        return RopeScaling.patched_length(self, geometry)

    def resolved_window(self, geometry: Geometry) -> int:
        """How many tokens are seen at their own distance."""
        return self.window if self.window is not None else max(self.resolved_original(geometry) // 4, 1)

    def resolved_group(self, geometry: Geometry) -> int:
        """How many neighbouring positions become one."""
        return self.group_size if self.group_size is not None else self._smallest_group(geometry)

    def far_positions(self, geometry: Geometry, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where queries and keys at the integer `positions` (...) stand for each other when they are `window` or more tokens apart."""
        group, window = self.resolved_group(geometry), self.resolved_window(geometry)
        grouped = positions // group
        return grouped + (window - window // group), grouped

    def branches(self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor) -> tuple[Branch, ...]:
        edge = queries - self.resolved_window(geometry) + 1
        query, _ = self.far_positions(geometry, queries)
        _, key = self.far_positions(geometry, keys)
        return Branch(edge, None, queries, keys), Branch(None, edge, query, key)

    def unchanged(self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return (queries.amax(-1) - keys.amin(-1) < self.resolved_window(geometry)).all()

    def _smallest_group(self, geometry: Geometry) -> int:
        window = self.resolved_window(geometry)
        return -(-(self.patched_length(geometry) - window) // (self.resolved_original(geometry) - window))

    def _reach(self, group: int, geometry: Geometry) -> int:
        """Tokens that fit where the farthest distance is the original length."""
        window = self.resolved_window(geometry)
        return (self.resolved_original(geometry) - window) * group + window
