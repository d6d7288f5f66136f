"""One softmax over far and near keys out of two calls of the fused CPU kernel, merged by their log-sum-exp.

With `o_far, l_far` and `o_near, l_near` the outputs and log-sum-exps of the two, `l = log(exp(l_far) + exp(l_near))` is that of all keys and
`exp(l_far - l) o_far + exp(l_near - l) o_near` their output. In the backward pass the kernel's own backward, given the merged output and
`l`, yields the exact gradients of each part, as `exp(logit - l)` is the weight in the whole softmax. Only inputs, output and `l` are kept.

The kernel is the one that `scaled_dot_product_attention` runs on a CPU; it is called by its name in `aten` because the public function does
not hand its log-sum-exp out.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable


if TYPE_CHECKING:
    from hfpos.attention.tiles import Tiles

    Two = tuple[torch.Tensor, torch.Tensor]

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def can_merge(query: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> bool:
    """Whether the kernel takes these tensors and does what the options of an attention call ask for."""
    on_cpu = query.device.type == value.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and query.shape[-1] == value.shape[-1] and not options.get("dropout") and not options.get("softcap")


def merged_attention(
    queries: Two, keys: Two, value: torch.Tensor, tiles: Tiles, scaling: float | None
) -> torch.Tensor:
    """Attention of queries (B, H, Q, D) to keys and value (B, Hkv, K, D): (B, Q, H, D).

    Args:
        queries, keys: as far tiles see them and as near ones do.
        tiles: the far and the near keys of each block of queries.
        scaling: the factor on the logits; None for `D ** -0.5`.
    """
    groups = queries[0].shape[1] // value.shape[1]
    far, near, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (*keys, value))
    return _Merged.apply(*queries, far, near, value, tiles, scaling).transpose(1, 2).contiguous()


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        far_query, near_query, far_key, near_key, value, tiles, scaling = arguments
        output, totals = torch.empty_like(far_query), []
        for columns in tiles:
            parts = [
                KERNEL(
                    query[:, :, columns],
                    key[:, :, tile.span],
                    value[:, :, tile.span],
                    attn_mask=tile.additive(query.dtype),
                    scale=scaling,
                )
                for tile, query, key in zip(
                    tiles.of(columns), (far_query, near_query), (far_key, near_key), strict=True
                )
            ]
            total = torch.logaddexp(*(sums for _, sums in parts))
            output[:, :, columns] = sum(part * (sums - total).exp()[..., None] for part, sums in parts)
            totals.append(total)
        total = torch.cat(totals, dim=-1)
        # a query that sees no key has a finite mask only: no gradient comes from it
        total = total.masked_fill(total < torch.finfo(value.dtype).min / 2, torch.inf)
        ctx.save_for_backward(far_query, near_query, far_key, near_key, value, output, total)
        ctx.tiles, ctx.scaling = tiles, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        *inputs, output, total = ctx.saved_tensors
        value, given = inputs[4], gradients[0].contiguous()
        wide = torch.promote_types(value.dtype, torch.float32)  # blocks are summed
        found = [torch.zeros_like(x, dtype=wide) for x in inputs]
        for columns in ctx.tiles:
            for tile, query, key in zip(ctx.tiles.of(columns), (0, 1), (2, 3), strict=True):
                parts = KERNEL_BACKWARD(
                    given[:, :, columns],
                    inputs[query][:, :, columns],
                    inputs[key][:, :, tile.span],
                    value[:, :, tile.span],
                    output[:, :, columns],
                    total[:, :, columns],
                    0.0,
                    False,
                    attn_mask=tile.additive(value.dtype),
                    scale=ctx.scaling,
                )
                for index, place, part in zip((query, key, 4), (columns, tile.span, tile.span), parts, strict=True):
                    found[index][:, :, place] += part
        return *(x.to(value.dtype) for x in found), None, None
