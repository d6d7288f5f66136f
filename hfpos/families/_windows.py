"""Layers that see the last tokens only: what a remapping of far tokens can do in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfpos.families._layers import layer_types
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Iterable

    from hfpos.scheme import Geometry
    from hfpos.schemes._remapping import Remapping


def refuse_within_windows(
    scheme: Remapping, geometry: Geometry, config: Any, layers: Iterable[int] | None, name: str
) -> None:
    """Raise `PatchError` where every layer that would get `scheme` sees too few tokens for it to change anything.

    Args:
        config: of the decoder; says which layers slide, and how many tokens they see.
        layers: those that rotate; None for all.
        name: of the model.
    """
    window = getattr(config, "sliding_window", None)
    types = layer_types(config)
    by_type = getattr(config, "layer_types", None) is not None
    rotating = range(len(types)) if layers is None else layers
    slide = all("sliding" in types[layer] for layer in rotating if by_type)
    if window is not None and slide and unchanged_within(scheme, geometry, window):
        raise PatchError(
            f"{scheme.name!r} changes nothing in {name}: the layers that rotate see the last {window} tokens only (sliding_window), and those are "
            "seen at their own distance; take a smaller window, or a scheme of the freq seam"
        )


def unchanged_within(scheme: Remapping, geometry: Geometry, window: int) -> bool:
    """Whether queries that see the last `window` tokens, themselves included, see all of them at their own distance.

    Tried at queries that are spread over a length, well behind the first one.
    """
    length = scheme.resolved_original(geometry)
    queries = torch.linspace(3 * length + window, 4 * length + window, 64).long()[:, None]
    own = torch.arange(window - 1, -1, -1)
    distance, seen = scheme.distances(geometry, queries, queries - own)
    factor = scheme.query_factor(geometry, queries)
    return bool(seen.all() and (distance == own).all() and (factor is None or (factor == 1).all()))
