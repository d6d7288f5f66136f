"""Attention under a scheme of the score seam without a model: what a scheme does when it is called.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim, R rotary_dim.
"""

from __future__ import annotations

from typing import Any

import torch

from hfpos.attention.dense import causal
from hfpos.attention.score import score_rotation
from hfpos.call import Call
from hfpos.scheme import PatchError
from hfpos.scheme.alone import check_batch, check_positions, check_tensor, rotary_model


class _Module(torch.nn.Module):
    """What attention functions read of a model's attention module."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def attend_alone(
    scheme: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    theta: float,
    rotary_dim: int | None,
    convention: str,
) -> torch.Tensor:
    """Causal attention of query (B, H, Q, D) to key, value (B, Hkv, K, D) under `scheme`: (B, H, Q, D).

    The arguments are those of a scheme's `__call__`.
    """
    _check(scheme.name, query, key, value)
    queries, keys = query.shape[2], key.shape[2]
    geometry = rotary_model(scheme.name, query, theta, rotary_dim)
    scheme.check(geometry)
    k_positions = _positions(scheme.name, positions, query.shape[0], keys, query.device)
    seam = score_rotation(scheme, geometry, convention, None, scheme.frequencies(geometry)[0])
    call = Call(seam, k_positions[:, keys - queries :], k_positions, keys)
    module = _Module(query.shape[1] // key.shape[1])
    # a single query sees every key; as many queries as keys need no mask
    mask = causal(queries, keys, query.device, keys - queries) if 1 < queries < keys else None
    return seam.attend(module, query, key, value, mask, call=call, backend="sdpa")[0].transpose(1, 2)


def _check(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise `PatchError` for shapes or dtypes that do not go together."""
    for what, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, what, x)
    shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
    expected = "expected query (batch, heads, queries, width), key and value (batch, key heads, keys, width)"
    if not query.ndim == key.ndim == value.ndim == 4 or key.shape != value.shape:
        raise PatchError(f"{name}: query, key and value have shapes {shapes}; {expected}")
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]) or query.shape[1] % key.shape[1]:
        raise PatchError(
            f"{name}: query, key and value have shapes {shapes}; {expected}, the heads a multiple of the key heads"
        )
    if not 0 < query.shape[2] <= key.shape[2]:
        raise PatchError(
            f"{name}: {query.shape[2]} queries were given for {key.shape[2]} keys; expected queries that are the last of the keys' tokens"
        )
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise PatchError(
            f"{name}: query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; expected one floating dtype"
        )


def _positions(name: str, given: torch.Tensor | None, rows: int, keys: int, device: torch.device) -> torch.Tensor:
    """Where the keys stand, (B or 1, K) int64."""
    if given is None:
        return torch.arange(keys, device=device)[None]
    check_positions(name, "positions", given)
    found = given.to(device, torch.int64).view(-1, given.shape[-1])
    check_batch(name, positions=found.shape[0], queries=rows)
    if found.shape[1] != keys or found.shape[0] > rows:
        raise PatchError(f"{name}: positions have shape {tuple(given.shape)}; expected ({keys},) or ({rows}, {keys})")
    return found
