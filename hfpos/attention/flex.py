"""A bias that depends on the distance alone, inside flex_attention: one row of numbers for each head, looked up for each logit.

One compiled kernel serves every layer and every length: what changes between them is handed over as tensors. The row may be learned.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hfpos.attention.dense import bias_of
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.attention.blocks import Sight
    from hfpos.scheme import Bias


def refuse_flex(
    scheme: Bias, differentiable: bool, device: str, mask: torch.Tensor | None, options: dict[str, Any]
) -> None:
    """Raise `PatchError` for what flex_attention cannot do."""
    problem = (
        "has no backward pass on the CPU; train on a GPU, or run inference under torch.no_grad()"
        if differentiable and device == "cpu"
        else "has no attention dropout; set it to 0"
        if options.get("dropout")
        else "is not given attention sinks, which this model has"
        if options.get("s_aux") is not None
        else "is not given the numbers that this model adds in its masks"
        if mask is not None and mask.dtype != torch.bool
        else None
    )
    if problem:
        raise PatchError(f"{scheme.name!r}: flex_attention {problem}; or choose backend='sdpa'")


def biased_flex_attention(
    scheme: Bias,
    weights: dict[str, torch.Tensor],
    sight: Sight,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    memo: dict[Any, Any],
) -> torch.Tensor:
    """Attention with the bias of `scheme`: query (B, H, Q, D), key and value (B, Hkv, K, D) -> (B, Q, H, D).

    Args:
        memo: lives as long as the forward; the block mask is kept in it for the other layers.
    """
    batch, heads, queries, _ = query.shape
    q_positions, k_positions = (x.expand(batch, -1) for x in (sight.q_positions, sight.k_positions))
    zero, distances = _distances(sight, memo)
    row = bias_of(scheme, distances[None], distances.new_zeros(1, 1), weights)[0, :, :, 0].contiguous()

    def add_bias(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score + row[h, zero + q_positions[b, i] - k_positions[b, j]]

    if heads & (heads - 1):  # flex_attention groups query heads where they are a power of two
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    output = attend(
        query,
        key,
        value,
        score_mod=add_bias,
        block_mask=_block_mask(sight, batch, queries, key.shape[2], memo),
        scale=scaling,
        enable_gqa=key.shape[1] != heads,
    )
    return output.transpose(1, 2).contiguous()


@functools.cache
def _compiled(function: Callable = flex_attention) -> Callable:
    return torch.compile(function, dynamic=True)


def _distances(sight: Sight, memo: dict[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of distance 0 in, and all of, the distances (N,) from the least to the largest that occur."""
    if "distances" not in memo:
        least = int(sight.q_positions.min() - sight.k_positions.max())
        most = int(sight.q_positions.max() - sight.k_positions.min())
        device = sight.q_positions.device
        memo["distances"] = torch.tensor(-least, device=device), torch.arange(least, most + 1, device=device)
    return memo["distances"]


def _block_mask(sight: Sight, batch: int, queries: int, keys: int, memo: dict[Any, Any]) -> BlockMask | None:
    mask = sight.mask
    if mask is None and not sight.causal:
        return None
    known = ("block mask", None if mask is None else id(mask), queries, keys)
    if known not in memo:
        device = sight.q_positions.device
        # compiled it never holds queries x keys, which at 131,072 tokens is 17 GB
        make: Callable = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
        if mask is None:
            memo[known] = make(_seen, None, None, queries, keys, device=str(device))
        else:
            whole = mask.expand(batch, -1, queries, -1)

            def allowed(b: Any, h: Any, i: Any, j: Any) -> Any:
                return whole[b, 0, i, j]

            memo[known] = make(allowed, batch, None, queries, keys, device=str(device))
    return memo[known]


def _seen(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j
