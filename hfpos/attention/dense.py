"""Attention with the bias written out: the reference, the path for one-token decoding, and for biases that do not separate.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from torch import nn

    from hfpos.scheme import Bias


def causal(queries: int, keys: int, device: torch.device, first: int = 0) -> torch.Tensor:
    """The boolean mask (1, 1, Q, K) that a call without a mask stands for: query i sees keys 0 .. i. The queries are i = `first` and on."""
    rows, columns = torch.arange(first, first + queries, device=device)[:, None], torch.arange(keys, device=device)
    return (columns <= rows)[None, None]


def full_mask(
    mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, module: nn.Module, is_causal: bool | None = None
) -> torch.Tensor | None:
    """The mask itself, or what None stands for: causal, and every key for a single query or in a model that is not causal."""
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and is_causal and query.shape[2] > 1:
        return causal(query.shape[2], key.shape[2], query.device)
    return mask


def in_window(
    mask: torch.Tensor | None, queries: int, keys: torch.Tensor, total: int | torch.Tensor, width: int
) -> torch.Tensor:
    """The mask (1 or B, 1, Q, K) without the keys that stand `width` tokens or more before the query.

    Args:
        mask: boolean or additive; None for a plain causal one.
        queries: how many there are, the last of all tokens.
        keys: (B, Hkv, K, D), with room for more in a static cache.
        total: how many keys have been seen, those of this call included.
    """
    distances = torch.arange(queries, device=keys.device)[:, None] + (total - queries)
    distances = distances - torch.arange(keys.shape[2], device=keys.device)
    near = distances < width
    if mask is None:
        return (near & (distances >= 0))[None, None]
    return mask & near if mask.dtype == torch.bool else mask.masked_fill(~near, torch.finfo(mask.dtype).min)


def bias_of(
    scheme: Bias,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    weights: dict[str, torch.Tensor],
    query: torch.Tensor | None = None,
) -> torch.Tensor:
    """The bias (B, H, Q, K) of a scheme, in the dtype of its weights: autocast would round what near keys differ by."""
    if not torch.is_autocast_enabled(q_positions.device.type):
        return scheme.formula(q_positions, k_positions, weights, query)
    with torch.autocast(q_positions.device.type, enabled=False):
        return scheme.formula(q_positions, k_positions, weights, query)


def add_bias(bias: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask in `dtype`: `bias` (B, H, Q, K) where `mask` (bool, or additive) lets a query see a key."""
    if mask is None:
        return bias.to(dtype)
    if mask.dtype != torch.bool:
        return (bias + mask).clamp(min=torch.finfo(dtype).min).to(dtype)
    return torch.where(mask, bias.to(dtype), torch.finfo(dtype).min)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention with the weights returned, for families that have no eager function of their own.

    Args:
        query: (B, H, Q, D); key, value: (B, Hkv, K, D).
        attention_mask: additive or boolean, broadcast to (B, H, Q, K).

    Returns:
        the output (B, Q, H, D) and the weights (B, H, Q, K), softmax in float32 or wider.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    mask = full_mask(attention_mask, query, key, module, kwargs.get("is_causal"))
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, torch.finfo(logits.dtype).min) if mask.dtype == torch.bool else logits + mask
        )
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = torch.softmax(logits, dim=-1, dtype=wide).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
