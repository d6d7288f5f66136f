"""A linear bias on flash-attention 2: by its own `alibi_slopes` where positions count up by one, else by extra dimensions.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_flash_attention_utils import _flash_attention_forward


if TYPE_CHECKING:
    from hfpos.attention.blocks import Sight


def flash_alibi(
    slopes: torch.Tensor,
    sight: Sight,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor | None:
    """flash-attention's own ALiBi: query (B, H, Q, D), key, value (B, Hkv, K, D) -> (B, Q, H, D).

    None where it does not apply: its distances are those of indices, so there may be no padding, no gap and no new document.
    """
    ends = (x[:, -1] for x in (sight.q_positions, sight.k_positions))
    if sight.mask is not None or not sight.counted or not bool(torch.eq(*ends).all()):
        return None
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=sight.causal,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        alibi_slopes=slopes.float(),
    )


def flash_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' call of flash-attention 2. Its attention function takes the name of the kernel from the config, which names ours."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    output = _flash_attention_forward(
        q,
        k,
        v,
        mask,
        query_length=query.shape[2],
        is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        dropout=dropout,
        softmax_scale=scaling,
        sliding_window=sliding_window,
        attn_implementation="flash_attention_2",
        **options,
    )
    return output, None
