"""One softmax over keys that are seen in several ways, out of calls of the fused CPU kernel that are merged by their log-sum-exp.

With `o_n, l_n` the output and log-sum-exp of each call, `l = log(sum_n exp(l_n))` is that of all keys and `sum_n exp(l_n - l) o_n` their
output. In the backward pass the kernel's own backward, given the merged output and `l`, yields the exact gradients of each part, as
`exp(logit - l)` is the weight in the whole softmax. Only inputs, output and `l` are kept.

The kernel is the one that `scaled_dot_product_attention` runs on a CPU; it is called by its name in `aten` because the public function does
not hand its log-sum-exp out.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


if TYPE_CHECKING:
    from hfpos.attention.tiles import Tile, Tiles

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Ways(NamedTuple):
    """Queries and keys as each branch sees them; branches may share.

    Attributes:
        queries: (B, H, Q, D) each.
        keys: (B, Hkv, K, D) each.
        of_branch: for each branch, the indices of its queries and of its keys.
    """

    queries: list[torch.Tensor]
    keys: list[torch.Tensor]
    of_branch: list[tuple[int, int]]


def can_merge(query: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> bool:
    """Whether the kernel takes these tensors and does what the options of an attention call ask for."""
    on_cpu = query.device.type == value.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and query.shape[-1] == value.shape[-1] and not options.get("dropout") and not options.get("softcap")


def merged_attention(ways: Ways, value: torch.Tensor, tiles: Tiles, scaling: float | None) -> torch.Tensor:
    """Attention of `ways` to `value` (B, Hkv, K, D): (B, Q, H, D).

    Args:
        tiles: what each block of queries sees in each branch.
        scaling: the factor on the logits; None for `D ** -0.5`.
    """
    groups = ways.queries[0].shape[1] // value.shape[1]
    keys, value = [_repeat(x, groups) for x in ways.keys], _repeat(value, groups)
    output = _Merged.apply(tiles, ways.of_branch, scaling, value, *ways.queries, *keys)
    return output.transpose(1, 2).contiguous()


def _repeat(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        tiles, of_branch, scaling, value, *inputs = arguments
        output, totals = torch.empty_like(inputs[0]), []
        for columns in tiles:
            parts = [
                KERNEL(
                    query[:, :, columns],
                    key[:, :, tile.span],
                    value[:, :, tile.span],
                    attn_mask=tile.additive(value.dtype),
                    scale=scaling,
                )
                for tile, query, key in _tensors(tiles.of(columns), of_branch, inputs)
            ]
            output[:, :, columns], total = _merge(parts)
            totals.append(total)
        total = torch.cat(totals, dim=-1)
        # a query that sees no key has a finite mask only: no gradient comes from it
        total = total.masked_fill(total < torch.finfo(value.dtype).min / 2, torch.inf)
        ctx.save_for_backward(output, total, value, *inputs)
        ctx.settings = tiles, of_branch, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple:
        output, total, value, *inputs = ctx.saved_tensors
        tiles, of_branch, scaling = ctx.settings
        given = gradients[0].contiguous()
        wide = torch.promote_types(value.dtype, torch.float32)  # blocks are summed
        found = [torch.zeros_like(x, dtype=wide) for x in (value, *inputs)]
        for columns in tiles:
            for tile, query, key in _tensors(tiles.of(columns), of_branch, list(range(1, len(found)))):
                parts = KERNEL_BACKWARD(
                    given[:, :, columns],
                    inputs[query - 1][:, :, columns],
                    inputs[key - 1][:, :, tile.span],
                    value[:, :, tile.span],
                    output[:, :, columns],
                    total[:, :, columns],
                    0.0,
                    False,
                    attn_mask=tile.additive(value.dtype),
                    scale=scaling,
                )
                for index, place, part in zip((query, key, 0), (columns, tile.span, tile.span), parts, strict=True):
                    found[index][:, :, place] += part
        return None, None, None, *(x.to(value.dtype) for x in found)


def _tensors(tiles: list[Tile], of_branch: list[tuple[int, int]], inputs: list[Any]) -> list[tuple[Tile, Any, Any]]:
    """Each tile with its queries and its keys out of `inputs`, which are all queries and then all keys."""
    first_key = 1 + max(query for query, _ in of_branch)
    chosen = [(tile, *of_branch[tile.way]) for tile in tiles]
    return [(tile, inputs[query], inputs[first_key + key]) for tile, query, key in chosen]


def _merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp of all keys out of those of each part."""
    if len(parts) == 1:
        return parts[0]
    total = torch.stack([sums for _, sums in parts]).logsumexp(0)
    output = torch.zeros_like(parts[0][0], dtype=total.dtype)
    for part, sums in parts:
        output.addcmul_(part, (sums - total).exp_()[..., None])
    return output, total
