"""A bias that depends on the distance alone, inside flex_attention: one row of numbers for each head, looked up for each logit.

One compiled kernel serves every layer and every length: what changes between them is handed over as tensors. The row may be learned.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad

from hfpos.attention.dense import bias_of
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.attention.blocks import Sight
    from hfpos.scheme import Bias


LEAST = 2**14  # elements of what is looked up
KINDS = 64  # of calls that differ in more than lengths; torch's own limit is 8, from where on it holds all logits


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
    zero, distances = _distances(sight, memo)
    row = _steady(bias_of(scheme, distances[None], distances.new_zeros(1, 1), weights)[0, :, :, 0].contiguous())
    q_width, q_positions = _rows("queries", sight.q_positions, batch, memo)
    k_width, k_positions = _rows("keys", sight.k_positions, batch, memo)

    def add_bias(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score + row[h, zero + q_positions[b * q_width + i] - k_positions[b * k_width + j]]

    if heads & (heads - 1):  # flex_attention groups query heads where they are a power of two
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    mask = _block_mask(sight, batch, queries, key.shape[2], memo)
    with torch._dynamo.config.patch(recompile_limit=KINDS):
        output = attend(
            query, key, value, score_mod=add_bias, block_mask=mask, scale=scaling, enable_gqa=key.shape[1] != heads
        )
    return output.transpose(1, 2).contiguous()


@functools.cache
def _compiled(function: Callable = flex_attention) -> Callable:
    return torch.compile(function, dynamic=True)


def _steady(x: torch.Tensor) -> torch.Tensor:
    """`x` (..., N); on a CPU with N filled up to a power of two, a constant of the compiled code.

    Where it is a symbol, torch 2.13 writes C++ that does not compile: it replaces one name within another.
    """
    if x.device.type == "cpu":
        x = pad(x, (0, max(1 << (x.shape[-1] - 1).bit_length(), LEAST) - x.shape[-1]))
        torch._dynamo.mark_static(x)
    return x


def _rows(role: str, x: torch.Tensor, batch: int, memo: dict[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """How many elements belong to a row of the batch in `x` (B or 1, ...), and all of them one behind the other."""
    known = (role, id(x))
    if known not in memo:
        rows = x.expand(batch, *x.shape[1:]).reshape(batch, -1)
        memo[known] = torch.tensor(rows.shape[1], device=x.device), _steady(rows.flatten().clone()), x
    return memo[known][:2]


def _distances(sight: Sight, memo: dict[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The index of distance 0 in, and all of, the distances (N,) from the least to the largest that occur."""
    known = ("distances", sight.q_positions.shape, sight.k_positions.shape)  # a layer with a window caches fewer keys
    if known not in memo:
        least = int(sight.q_positions.min() - sight.k_positions.max())
        most = int(sight.q_positions.max() - sight.k_positions.min())
        device = sight.q_positions.device
        memo[known] = torch.tensor(-least, device=device), torch.arange(least, most + 1, device=device)
    return memo[known]


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
            width, whole = _rows("mask", mask.expand(-1, -1, queries, -1), batch, memo)
            of_head = torch.tensor(queries * keys if mask.shape[1] > 1 else 0, device=device)
            of_query = torch.tensor(keys, device=device)

            def allowed(b: Any, h: Any, i: Any, j: Any) -> Any:
                return whole[b * width + h * of_head + i * of_query + j]

            heads = mask.shape[1] if mask.shape[1] > 1 else None
            memo[known] = make(allowed, batch, heads, queries, keys, device=str(device))
    return memo[known]


def _seen(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j
