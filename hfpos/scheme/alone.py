"""What schemes need that are used without a model: checks of the tensors they are given, and the rotation itself.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfpos.scheme.errors import PatchError, require_number
from hfpos.scheme.geometry import Geometry


if TYPE_CHECKING:
    from hfpos.scheme.bias import Bias
    from hfpos.scheme.rotary import Rope

NO_MODEL = "there is no model here to read a trained length from"


def check_tensor(scheme: str, name: str, given: Any, expected: str = "a tensor") -> None:
    """Raise `PatchError` unless `given` is a tensor."""
    if not isinstance(given, torch.Tensor):
        raise PatchError(f"{scheme}: {name} is a {type(given).__name__}; expected {expected}")


def check_floats(scheme: str, name: str, given: Any) -> None:
    """Raise `PatchError` unless `given` is a tensor of a floating dtype."""
    check_tensor(scheme, name, given)
    if not given.is_floating_point():
        raise PatchError(f"{scheme}: {name} has the dtype {given.dtype}; expected floats")


def check_positions(scheme: str, name: str, positions: torch.Tensor, whole: bool = True) -> None:
    """Raise `PatchError` unless `positions` is a tensor of numbers, (tokens,) or (B, tokens); `whole`: of integers."""
    check_tensor(scheme, name, positions, "a tensor of positions")
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


def check_weights(scheme: Bias, weights: Any, head_dim: int | None) -> None:
    """Raise `PatchError` unless `weights` are tensors as the scheme's own: for `num_heads`, or for any one number of heads."""
    if not isinstance(weights, dict):
        raise PatchError(
            f"{scheme.name}: weights are a {type(weights).__name__}; expected a dict of tensors, as from `weights`"
        )
    for name, value in weights.items():
        check_floats(scheme.name, f"{name} of the weights", value)
    found = {name: tuple(value.shape) for name, value in weights.items()}
    sizes = sorted({size for shape in found.values() for size in shape if size})
    expected = {}
    for heads in sizes or [1] if scheme.num_heads is None else [scheme.num_heads]:
        own = scheme.weights(unknown_model(heads, head_dim or 1))
        expected = {name: tuple(value.shape) for name, value in own.items()}
        if expected == found:
            return
    if expected.keys() != found.keys():
        names = ", ".join(found) or "nothing"
        raise PatchError(f"{scheme.name}: weights hold {names}; expected {', '.join(expected)}, as from `weights`")
    shapes = (", ".join(f"{name} {shape}" for name, shape in each.items()) for each in (found, expected))
    raise PatchError("{}: weights have the shapes {}; expected {}, as from `weights`".format(scheme.name, *shapes))


def unknown_model(heads: int, head_dim: int, rotary_dim: int | None = None, theta: float = 1e4) -> Geometry:
    """The geometry where there is no model."""
    return Geometry(
        heads=heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim or head_dim,
        theta=float(theta),
        trained_length=None,
        allowed_length=None,
        length_problem=NO_MODEL,
    )


def rotary_model(scheme: str, query: torch.Tensor, theta: float, rotary_dim: int | None) -> Geometry:
    """The geometry of attention whose queries (..., H, Q, D) are rotated; `PatchError` for what cannot be."""
    require_number(scheme, "theta", theta, least=1, strictly=True)
    head_dim = query.shape[-1]
    width = head_dim if rotary_dim is None else rotary_dim
    if not isinstance(width, int) or width % 2 or not 2 <= width <= head_dim:
        raise PatchError(
            f"{scheme}: {width} dimensions of a head that has {head_dim} cannot be rotated; expected an even number up to that: pass "
            "rotary_dim="
        )
    return unknown_model(query.shape[-3], head_dim, width, theta)


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
            f"{scheme.name}: its frequencies differ from query to query, so that no rotation of q and k alone does the same; for attention "
            "call attend(query, key, value), or fix them with cache='pinned' and factor or target_length"
        )
    _check_heads(scheme.name, q, k, positions)
    geometry = rotary_model(scheme.name, q, theta, rotary_dim)
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
        check_tensor(scheme, name, x)
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
