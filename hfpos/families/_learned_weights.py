"""The learned weights of a bias, as edits of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpos.attention.learned import LEARNED, LearnedBias
from hfpos.plan import Added, own_attribute
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from hfpos.families._family import Family
    from hfpos.plan import Edit
    from hfpos.scheme import Bias, Geometry
    from hfpos.schemes.per_layer import PerLayer


def learned_of(scheme: PerLayer) -> Bias | None:
    """The one scheme in it that learns; the decoder holds the weights of no more."""
    learned: list[Any] = [each for each in scheme.distinct() if getattr(each, "learned", False)]
    if len(learned) > 1:
        raise PatchError(
            f"per_layer: {learned[0].name!r} and {learned[1].name!r} are both learned, and a model holds the learned weights of one scheme; "
            "expected at most one kind among the layers"
        )
    return learned[0] if learned else None


def learned_edits(family: Family, scheme: Bias | None, geometry: Geometry) -> list[Edit]:
    """The edit that puts the weights of a learned bias into the decoder."""
    if scheme is None or not scheme.learned:
        return []
    names = "layer_idx", "layer_id"
    indices = (getattr(module, name, None) for module in family.decoder.modules() for name in names)
    layers = 1 + max((index for index in indices if isinstance(index, int)), default=-1)
    if not layers and not scheme.shared:
        raise PatchError(
            f"{scheme.name!r} has weights for each layer, and the layers of {type(family.model).__name__} do not say which they are; use a bias "
            "without weights, or with weights that all layers share, e.g. alibi or kerple"
        )
    weights = LearnedBias(family.learned_start(scheme, geometry), max(layers, 1), scheme.shared)
    return [Added(family.decoder, LEARNED, own_attribute(family.decoder, LEARNED), weights)]
