"""The bias seam: adds a linear bias to the logits, without a dense bias tensor wherever it can.

`softmax_j(s q.k_j - m (i - j))` does not change when the row constant `-m i` is dropped, and `m j` is a dot product: each query gets
the extra features `m / s`, each key the features `j`, and plain attention does the rest. Positions thus travel inside q and k,
and every kernel, mask and sliding window works unchanged at the speed of attention without a bias.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from hfpos.attention.dense import add_bias, full_mask
from hfpos.attention.interface import is_fused, keep_backend
from hfpos.constant import Constant, exact


if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from hfpos.positions import Call
    from hfpos.schemes.alibi import Alibi

FEATURES = 8  # 3 parts of a position times 2 parts of a slope, padded to what kernels like
BALANCE = 256.0  # a power of two, exact: keeps positions up to 16 million inside float16's range


def split(values: torch.Tensor, dtype: torch.dtype, parts: int) -> list[torch.Tensor]:
    """`parts` tensors of `dtype` that sum to the float32 `values` as nearly as that many can (3 bfloat16 parts: exactly)."""
    pieces = []
    for _ in range(parts):
        pieces.append(values.to(dtype))
        values = values - pieces[-1].float()
    return pieces


def linear_features(
    slopes: torch.Tensor, scaling: float, q_positions: torch.Tensor, k_positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features f (H, 8) and g (B, K, 8) with `scaling * <f_h, g_j> = slopes[h] * (k_positions[j] - centre)`.

    The centre, the middle of the row's queries, drops out of the softmax; it keeps the products small, so that float32 sums
    stay accurate at long range, and makes a one-token call exact near the token. In bfloat16 and float16 positions and slopes
    are split into parts, so that only the rounding of the kernel's own sums is left.
    """
    centre = (q_positions.amin(-1, keepdim=True) + q_positions.amax(-1, keepdim=True)) // 2
    offsets = (k_positions - centre).float() / BALANCE
    weights = slopes * (BALANCE / scaling)
    one_part = dtype in (torch.float32, torch.float64)
    f = split(weights, dtype, 1 if one_part else 2)
    g = split(offsets, dtype, 1 if one_part else 3)
    pairs = [(a, b) for a in f for b in g]
    room = (0, FEATURES - len(pairs))
    return pad(torch.stack([a for a, _ in pairs], -1), room), pad(torch.stack([b for _, b in pairs], -1), room)


class LinearBias:
    """ALiBi inside attention.

    Args:
        scheme: gives the slopes, and the dense bias where the fast path does not apply.
        heads: attention heads of a layer.
    """

    def __init__(self, scheme: Alibi, heads: int) -> None:
        self.scheme = scheme
        self.slopes = Constant(exact(scheme.head_slopes(heads)))

    def check_backend(self, decoder: Any) -> None:
        """Make sure that attention still goes through the registered functions."""
        keep_backend(decoder.config)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        call: Call,
        inner: Callable,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of query (B, H, Q, D) to key, value (B, Hkv, K, D) with the bias: output (B, Q, H, D) and the weights, if any."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        slopes, q_positions = self.slopes.on(query.device), call.q_positions.to(query.device)
        k_positions = call.keys_of_layer(key.shape[2]).to(query.device)
        # One query: a row of the bias costs less than new keys. A soft cap or an attention sink needs the bias itself, not only
        # its differences along a row. Against a custom mask that shows the future, only `bidirectional` tells what is meant.
        # An unfused function holds every logit anyway, and would round the large ones that the features make.
        needs_bias = kwargs.get("softcap") is not None or hasattr(module, "sinks") or self.scheme.bidirectional
        if query.shape[2] == 1 or needs_bias or not is_fused(inner):
            bias = self.scheme.bias(q_positions, k_positions, slopes)
            mask = full_mask(mask, query, key, module, kwargs.get("is_causal"))
            mask = add_bias(bias, mask, query.dtype).expand(query.shape[0], -1, -1, -1)
            return inner(module, query, key, value, mask, scaling=scaling, **kwargs)
        f, g = linear_features(slopes, scaling, q_positions, k_positions, query.dtype)
        width = value.shape[-1]
        query = torch.cat((query, f[None, :, None].expand(query.shape[0], -1, query.shape[2], -1)), dim=-1)
        same_width = width == key.shape[-1]
        key = torch.cat((key, g[:, None].expand(key.shape[0], key.shape[1], -1, -1)), dim=-1)
        if same_width:  # fused kernels want values as wide as keys
            value = pad(value, (0, FEATURES))
        output, weights = inner(module, query, key, value, mask, scaling=scaling, **kwargs)
        return output[..., :width].contiguous(), weights
