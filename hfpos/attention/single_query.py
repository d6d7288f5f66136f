"""One query under a scheme that remaps positions: it is not rotated at all, and each key by how far away it is seen.

Shapes: B batch, H heads, Hkv key heads, K keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfpos.attention.once import once
from hfpos.schemes._remapping import inside


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.attention.remapped import RemappedRotation
    from hfpos.call import Call
    from hfpos.schemes._remapping import Branch


def single_query(
    seam: RemappedRotation,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    branches: tuple[Branch, ...],
    k_positions: torch.Tensor,
    *,
    call: Call,
    inner: Callable,
    options: dict,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of query (B, H, 1, D) to key, value (B, Hkv, K, D) by the model's own function: output (B, 1, H, D) and the weights, if any.

    Args:
        query: multiplied by its factor already.
        mask: (B or 1, 1 or H, 1, K) boolean or additive, or None.
        branches: as the query, at one position in each row, sees keys.
        k_positions: (B or 1, K).
    """
    places, seen = once(call, "places", (seam, branches, k_positions), lambda: _places(branches, k_positions))
    if not seam.scheme.hides:
        return inner(module, query, seam.turn(key, places, call), value, mask, **options)
    keys, index = key.shape[2], None
    if not torch.compiler.is_compiling():  # which cannot leave out keys by their number
        index, few, seen = once(call, "seen", (places,), lambda: _only_seen(places, seen))
        key, value = key.index_select(2, index), value.index_select(2, index)
        mask, places = None if mask is None else mask.index_select(-1, index), few
    mask = _hide(mask, seen[:, None, None], query.dtype)
    output, weights = inner(module, query, seam.turn(key, places, call), value, mask, **options)
    if weights is not None and index is not None:
        weights = weights.new_zeros(*weights.shape[:-1], keys).index_copy(-1, index, weights)
    return output, weights


def _places(branches: tuple[Branch, ...], k_positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where keys (B or 1, K) stand for a query at 0, as far away as it sees them, and which ones it sees."""
    places, seen = branches[0].key - branches[0].query, torch.zeros_like(k_positions, dtype=torch.bool)
    for branch in branches:
        here = inside(branch, k_positions[:, None])[:, 0]
        places, seen = torch.where(here, branch.key - branch.query, places), seen | here
    return places, seen


def _only_seen(places: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The indices of the keys that some row sees, and `places` and `seen` of these alone."""
    index = seen.any(0).nonzero()[:, 0]
    return index, places.index_select(-1, index), seen.index_select(-1, index)


def _hide(mask: torch.Tensor | None, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask of `dtype` that shows what both `mask` and `seen` (B or 1, 1, 1, K) show."""
    if mask is None or mask.dtype == torch.bool:
        seen = seen if mask is None else seen & mask
        mask = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, mask, torch.finfo(dtype).min)
