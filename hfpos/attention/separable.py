"""A bias that is a product of something of the query and something of the key: as a few more dimensions of both.

`softmax_j(s q_i . k_j + f_i . g_j)`: each query gets the extra features `f_i / s`, each key `g_j`, and plain attention does the rest. What
depends on i alone drops out of the softmax, so that ALiBi's `-m (i - j)` becomes `m j`, one feature. Positions thus travel inside q and k,
and every kernel, mask and sliding window works unchanged, at the speed of attention without a bias.

The features make large logits, of which float32 keeps 24 bits: positions are counted from the middle of the queries, which halves the
largest. What is left, for L queries and slope m, is an error of the logit of `m L / 2 * 2 ** -24`, e.g. 6e-5 at 4,096 for m = 0.5.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim, F features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.scheme import Bias

MULTIPLE = 8  # of which kernels like a head's width to be
WIDEST = 256  # head that kernels take
BALANCE = 256.0  # a power of two, exact: keeps positions up to 16 million inside float16's range
PARTS = {torch.float32: (1, 1), torch.float64: (1, 1)}  # that f and g are split into
NARROW_PARTS = (2, 3)  # in narrower types


def split(values: torch.Tensor, dtype: torch.dtype, parts: int) -> list[torch.Tensor]:
    """`parts` tensors of `dtype` that sum to the float32 `values` as nearly as that many can (3 bfloat16 parts: exactly)."""
    pieces = []
    for _ in range(parts):
        pieces.append(values.to(dtype))
        values = values - pieces[-1].to(values.dtype)
    return pieces


def features(
    scheme: Bias,
    weights: dict[str, torch.Tensor],
    scaling: float,
    positions: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    centre: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Features (B, H, Q or 1, F) of queries and (B, 1, K, F) of keys, whose product times `scaling` is the bias.

    In bfloat16 and float16 both are split into parts, so that only the rounding of the kernel's own sums is left. None where the
    bias does not separate.

    Args:
        centre: (B or 1, 1), from which positions are counted, the same in all processes that share a sequence; the middle of the queries
            unless given.
    """
    q_positions, k_positions = positions
    if centre is None:
        centre = (q_positions.amin(-1, keepdim=True) + q_positions.amax(-1, keepdim=True)) // 2
    pair = scheme.factors(q_positions - centre, k_positions - centre, weights)
    if pair is None:
        return None
    f_parts, g_parts = PARTS.get(dtype, NARROW_PARTS)
    f = split(pair[0] * (BALANCE / scaling), dtype, f_parts)
    g = split(pair[1] / BALANCE, dtype, g_parts)
    columns = torch.cat([a for a in f for _ in g], -1), torch.cat([b for _ in f for b in g], -1)
    room = (0, -columns[0].shape[-1] % MULTIPLE)
    return pad(columns[0], room), pad(columns[1], room)


def fits(scheme: Bias, width: int, dtype: torch.dtype, weights: dict[str, torch.Tensor]) -> bool:
    """Whether heads of `width` with the features are still no wider than what kernels take."""
    nowhere = torch.zeros(1, 1, dtype=torch.int64, device=next(iter(weights.values())).device)
    pair = scheme.factors(nowhere, nowhere, weights)
    if pair is None:
        return False
    f_parts, g_parts = PARTS.get(dtype, NARROW_PARTS)
    extra = pair[0].shape[-1] * f_parts * g_parts
    return width + extra + -extra % MULTIPLE <= WIDEST


def separable_attention(
    scheme: Bias,
    weights: dict[str, torch.Tensor],
    positions: tuple[torch.Tensor, torch.Tensor],
    inner: Callable,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    *,
    scaling: float,
    centre: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the stock function `inner` with the features in place: output (B, Q, H, D) and the weights, if any."""
    added = features(scheme, weights, scaling, positions, query.dtype, centre)
    if added is None:
        raise TypeError(f"{scheme.name} does not separate")
    width = value.shape[-1]
    extra = added[0].shape[-1]
    if width == key.shape[-1]:  # fused kernels want values as wide as keys
        value = pad(value, (0, extra))
    query, key = (
        torch.cat((x, more.expand(x.shape[0], x.shape[1], x.shape[2], -1)), dim=-1)
        for x, more in zip((query, key), added, strict=True)
    )
    output, attention = inner(module, query, key, value, mask, scaling=scaling, **options)
    return output[..., :width].contiguous(), attention
