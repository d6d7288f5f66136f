"""Models that rotate nothing themselves: their numbers, and the rotation put into those whose attention caches turned keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpos.constant import Constant
from hfpos.rotation import cos_sin
from hfpos.scheme import Geometry


if TYPE_CHECKING:
    import torch

    from hfpos.scheme import Rope

DEFAULT_THETA = 10_000.0


def geometry_without_rotary(heads: int, width: int, length: int | None) -> Geometry:
    """The numbers of a model that rotates nothing itself; a rotation put into it turns whole heads, with the usual base.

    Args:
        width: of the hidden states, all heads together.
        length: that the model was trained at and allows, in tokens.
    """
    head_dim = width // heads
    return Geometry(
        heads=heads,
        head_dim=head_dim,
        rotary_dim=head_dim,
        theta=DEFAULT_THETA,
        trained_length=length,
        allowed_length=length,
    )


class PositionTables:
    """cos and sin at integer positions, for families whose attention rotates before it caches."""

    def __init__(self, scheme: Rope, geometry: Geometry) -> None:
        inv_freq, self.scale = scheme.frequencies(geometry)
        self.inv_freq = Constant(inv_freq)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each (..., R/2) float32, of `positions` (...)."""
        return cos_sin(positions, self.inv_freq.on(positions.device), self.scale)
