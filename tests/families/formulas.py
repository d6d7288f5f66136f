"""The attention logits of each scheme in float64, from the papers' formulas, for attention in one direction or in both."""

from typing import Any

import torch
from torch.nn.functional import pad, softplus
from transformers.models.t5.modeling_t5 import T5Attention


def sinusoids(length: int, width: int) -> torch.Tensor:
    """(length, width) float64: sines in the even columns, cosines in the odd ones."""
    angles = torch.arange(length).double()[:, None] * 10_000.0 ** (-torch.arange(0, width, 2).double() / width)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


def attention_logits(
    scheme: str | None, q: torch.Tensor, k: torch.Tensor, scale: float, both: bool, weights: dict[str, torch.Tensor]
) -> torch.Tensor:
    """`scale * q k` with the scheme's positions: (B, H, L, L) of q and k (B, H, L, D), token i at position i.

    Args:
        scheme: its name; None, "nope", "learned" and "sinusoidal" leave the logits as they are.
        both: keys behind the query are seen.
        weights: the learned ones of this layer, by name.
    """
    heads, length, width = q.shape[1:]
    behind = torch.arange(length)[:, None] - torch.arange(length)  # i - j
    distance = behind.abs().double()
    first = torch.arange(1, heads + 1).double()[:, None, None]
    bias: Any = 0.0
    if scheme == "rope":
        q, k = (_turned(x, 10_000.0 ** (-torch.arange(0, width, 2).double() / width)) for x in (q, k))
    elif scheme == "alibi":
        bias = -(2.0 ** (-8 * first / heads)) * distance  # of a power of two heads
    elif scheme == "kerple":
        r1, r2 = (softplus(weights[name])[:, None, None] for name in ("raw_r1", "raw_r2"))
        bias = -r1 * torch.log1p(r2 * distance)
    elif scheme == "sandwich":
        frequencies = 10_000.0 ** (-torch.arange(0, 128, 2).double() / 128)
        bias = ((behind[..., None] * frequencies).cos().sum(-1) - 64) / (8 * first / heads)
    elif scheme == "t5":
        buckets = T5Attention._relative_position_bucket(-behind, both, 32, 128)
        bias = weights["table"][buckets].permute(2, 0, 1)
    elif scheme == "shaw":
        vectors = weights["table"][(-behind).clamp(-16, 16) + 16]
        bias = torch.einsum("bhid,ijd->bhij", q * scale, vectors)
    return scale * q @ k.mT + bias


def _turned(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """`x` (..., L, D) with dimension i and i + D/2 turned by `position * frequencies[i]`."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2]).double()[:, None] * frequencies
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), -1)


def padded(x: torch.Tensor, left: int, right: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) with padding (id 0) on both sides, and their mask."""
    return pad(x, (left, right)), pad(torch.ones_like(x), (left, right))


def learned_weights(model: torch.nn.Module, seed: int = 1) -> None:
    """Give the learned weights of a patched model random values, as they start from zeros, or alike in all heads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "hfpos_" in name:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype) / 2)


def of_layer(model: Any, layer: int) -> dict[str, torch.Tensor]:
    """The learned weights of one layer of a patched stack, or none."""
    own = getattr(model, "hfpos_bias", None)
    return {} if own is None else {name: rows[layer if len(rows) > 1 else 0] for name, rows in own().items()}
