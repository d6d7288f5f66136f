"""What one forward of a patched model tells its attention layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch


if TYPE_CHECKING:
    from hfpos.attention.sequence_parallel import Part


class Memo:
    """What one layer has worked out for the others of the same forward. Not a dict itself: accelerate and torch copy those on their way."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}


class Call(NamedTuple):
    """What one forward call tells its attention layers; travels as the keyword argument `hfpos`.

    A tuple, so that accelerate's device hooks move the tensors in it along.

    Attributes:
        seam: what acts on queries, keys and logits (see `hfpos.attention.interface`); None where nothing does.
        q_positions: (B, Q) int64.
        k_positions: (B, K) int64, the keys in the cache and those of this call.
        total: how many keys have been seen, those of this call included; a tensor under a static cache.
        lengths: (B, 1) int64, the prompt lengths that a pinned scheme goes by; None elsewhere.
        rotation: cos and sin, each (B, 1, Q, R/2) float32, where attention rotates before it caches; None elsewhere.
        weights: the seam's learned weights, of all layers; None where nothing is learned.
        part: this process's part of a sequence that several share; None where it has all of it.
        memo: what one layer has worked out for the others.
    """

    seam: Any
    q_positions: torch.Tensor
    k_positions: torch.Tensor
    total: int | torch.Tensor
    lengths: torch.Tensor | None = None
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    weights: dict[str, torch.Tensor] | None = None
    part: Part | None = None
    memo: Memo | None = None

    def keys_of_layer(self, length: int) -> torch.Tensor:
        """Positions (B, length) of the keys one layer sees: a sliding layer sees the last ones, a static one has room left over."""
        known = self.k_positions.shape[-1]
        if length == known:
            return self.k_positions
        if not isinstance(self.total, torch.Tensor):
            if length < known:
                return self.k_positions[:, known - length :]
            return torch.nn.functional.pad(self.k_positions, (0, length - known))
        start = (self.total - length).clamp(min=0)
        index = (start + torch.arange(length, device=self.k_positions.device)).clamp(max=known - 1)
        return self.k_positions[:, index]
