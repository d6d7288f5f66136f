"""The score seam: what acts inside attention for a scheme, by what the scheme has to say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpos.attention.decayed import DecayedRotation
from hfpos.attention.remapped import RemappedRotation
from hfpos.attention.rotary import LengthAwareRotation


if TYPE_CHECKING:
    import torch

    from hfpos.attention.seam import Seam
    from hfpos.scheme import Geometry


def score_rotation(
    scheme: Any, geometry: Geometry, convention: str, layers: frozenset[int] | None, inv_freq: torch.Tensor
) -> Seam:
    """The seam for a `scheme` that has `branches`, a `decay`, or else `frequencies_at`.

    Args:
        geometry: of the model.
        convention: how the family pairs dimensions, `half` or `interleaved`.
        layers: those to rotate in, as the others keep what they have; None for all.
        inv_freq: (R/2,) radians per token of the unscaled model, for the schemes that keep them.
    """
    if hasattr(scheme, "branches"):
        return RemappedRotation(scheme, geometry, convention, layers, inv_freq)
    if hasattr(scheme, "decay"):
        return DecayedRotation(scheme, geometry, convention, layers, inv_freq)
    return LengthAwareRotation(scheme, geometry, convention, layers)
