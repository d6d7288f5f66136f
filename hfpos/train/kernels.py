"""Kernels as a model on hollow tensors sees them: with the memory that the real ones take."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class PlayedKernels(TorchFunctionMode):
    """Replaces the kernels whose hollow twin takes other memory, or that have none.

    Args:
        device: "cuda" or "cpu", whose kernels are played on hollow tensors that say they are on a CPU.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.cuda = device == "cuda"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self.cuda:
            return _attention(*args, **kwargs)
        if func is F.dropout and self.cuda:
            return _dropout(*args, **kwargs)
        if func is torch._grouped_mm and args[0].dtype != torch.bfloat16:  # which only real tensors may be
            return torch.ops.transformers.grouped_mm_fallback(*args, kwargs["offs"])
        if func.__name__ == "linear_cross_entropy":
            # one call: the logits of a chunk, which it holds inside, are held here for it
            rows = min(kwargs["options"].batch_chunk_size, len(args[0]))
            logits = args[0].new_empty(rows, len(args[1]))
            loss = func(*args, **kwargs)
            del logits
            return loss
        return func(*args, **kwargs)


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """CUDA has kernels in linear memory for dropout and for values narrower than keys; the CPU has not."""
    kwargs |= dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)) | {"dropout_p": 0.0}
    width = value.shape[-1]
    if width < query.shape[-1]:
        value = F.pad(value, (0, query.shape[-1] - width))
    return F.scaled_dot_product_attention(query, key, value, **kwargs)[..., :width]


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA keeps a mask of bytes, the CPU one of the input's dtype."""
    return torch.native_dropout(input, p, True)[0] if training and p else input
