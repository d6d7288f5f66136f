"""What schemes need that are used without a model: checks of the tensors they are given, and the rotation itself.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hfpos.scheme.errors import PatchError
from hfpos.scheme.geometry import Geometry


if TYPE_CHECKING:
    from hfpos.scheme.rotary import Rope

NO_MODEL = "there is no model here to read a trained length from"


def check_positions(scheme: str, name: str, positions: torch.Tensor, whole: bool = True) -> None:
    """Raise `PatchError` unless `positions` is a tensor of numbers, (tokens,) or (B, tokens); `whole`: of integers."""
    if not isinstance(positions, torch.Tensor):
        raise PatchError(f"{scheme}: {name} is a {type(positions).__name__}; expected a tensor of positions")
    if positions.ndim not in (1, 2):
        raise PatchError(f"{scheme}: {name} has shape {tuple(positions.shape)}; expected (tokens,) or (batch, tokens)")
    check_kind(scheme, name, positions, whole)


def check_kind(scheme: str, name: str, positions: torch.Tensor, whole: bool = True) -> None:
    """Raise `PatchError` unless `positions` holds real numbers; `whole`: integers."""
    wrong = positions.dtype == torch.bool or positions.is_complex() or (whole and positions.is_floating_point())
    if wrong:
        expected = "whole numbers, e.g. torch.int64" if whole else "integers or floats"
        raise PatchError(f"{scheme}: {name} has the dtype {positions.dtype}; expected {expected}")


def check_batch(scheme: str, **rows: int) -> None:
    """Raise `PatchError` unless all have as many rows as the others, or one."""
    if len({*rows.values()} - {1}) > 1:
        found = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise PatchError(f"{scheme}: the rows of the batch do not match ({found}); expected as many of each, or one")


def rotated(
    scheme: Rope,
    q: torch.Tensor,
    k: torch.Tensor,
    positions: torch.Tensor,
    *,
    theta: float,
    rotary_dim: int | None,
    convention: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`q` (..., H, Q, D) and `k` (..., Hkv, Q, D) rotated by `scheme`; angles in float64, the rest in float32 or wider."""
    from hfpos.rotation import cos_sin, rotate  # which imports this package

    if scheme.seam != "freq":
        raise PatchError(
            f"{scheme.name}: it acts on each pair of a query and a key, so that no rotation of q and k alone does the same; put it into "
            "a model with hfpos.patch, or take a scheme of the freq seam"
        )
    _check_heads(scheme.name, q, k, positions)
    width = q.shape[-1] if rotary_dim is None else rotary_dim
    if width % 2 or not 2 <= width <= q.shape[-1]:
        raise PatchError(
            f"{scheme.name}: {width} dimensions of a head that has {q.shape[-1]} cannot be rotated; expected an even number up to that: "
            "pass rotary_dim="
        )
    geometry = Geometry(
        heads=q.shape[-3],
        head_dim=q.shape[-1],
        rotary_dim=width,
        theta=float(theta),
        trained_length=None,
        allowed_length=None,
        length_problem=NO_MODEL,
    )
    scheme.check(geometry)
    inv_freq, scale = scheme.frequencies(geometry)
    tables = cos_sin(positions.double(), inv_freq.to(positions.device), scale)
    if positions.ndim == 2:
        tables = tables[0][:, None], tables[1][:, None]
    wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    cos, sin = (table.to(q.device, wide) for table in tables)
    return rotate(q, cos, sin, convention), rotate(k, cos, sin, convention)


def _check_heads(scheme: str, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> None:
    check_positions(scheme, "positions", positions, whole=False)
    least = positions.ndim + 2
    for name, x in (("q", q), ("k", k)):
        if not x.is_floating_point() or x.ndim < least or x.shape[-2] != positions.shape[-1]:
            batch = "batch, " if positions.ndim == 2 else ""
            raise PatchError(
                f"{scheme}: {name} has shape {tuple(x.shape)} and dtype {x.dtype}, positions {tuple(positions.shape)}; expected floats of "
                f"shape ({batch}heads, {positions.shape[-1]} tokens, head_dim)"
            )
    if q.shape[-1] != k.shape[-1]:
        raise PatchError(
            f"{scheme}: heads of q have {q.shape[-1]} dimensions, those of k {k.shape[-1]}; expected as many"
        )
    if positions.ndim == 2:
        check_batch(scheme, q=q.shape[0], k=k.shape[0], positions=positions.shape[0])
