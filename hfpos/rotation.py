"""The mathematics shared by every rotary scheme: frequencies, cos/sin tables and the rotation itself.

Shapes: B batch, H heads, Q tokens, D head_dim, R rotary_dim (R <= D).
"""

from __future__ import annotations

import torch

from hfpos.constant import exact
from hfpos.scheme import PatchError


CONVENTIONS = ("half", "interleaved", "half_last", "interleaved_last")


def inverse_frequencies(theta: float, rotary_dim: int) -> torch.Tensor:
    """`theta ** (-2 i / rotary_dim)` for i = 0 .. rotary_dim/2 - 1: (rotary_dim / 2,) float64, radians per token.

    Paper: RoFormer, arXiv 2104.09864, section 3.2.2.

    >>> inverse_frequencies(10000.0, 4)
    tensor([1.0000, 0.0100], dtype=torch.float64)
    """
    return exact([theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)])


def cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, scale: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of `positions * inv_freq`, times `scale`: each (..., R/2), in float32 or wider.

    Args:
        positions: (...) integer or float positions in tokens.
        inv_freq: (R/2,), or (..., R/2) for a set of frequencies of its own for each position.
        scale: the factor on cos and sin (YaRN's temperature enters here), a number or (...,).
    """
    angles = positions[..., None].to(inv_freq.dtype) * inv_freq
    if isinstance(scale, torch.Tensor):
        scale = scale[..., None]
    return angles.cos() * scale, angles.sin() * scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, convention: str = "half") -> torch.Tensor:
    """Rotate R dimensions of `x`, the first or the last; the rest passes through.

    Args:
        x: (..., D) queries or keys; computed in float32 or wider, returned in its own dtype.
        cos, sin: (..., R/2), broadcast against `x` without its last dimension.
        convention: `half` pairs dimension i with i + R/2 (LLaMA, GPT-NeoX), `interleaved` pairs 2i with 2i + 1 (GPT-J); with `_last` it is the
            last R dimensions that are rotated (DeepSeek).

    >>> x = torch.tensor([[1.0, 0.0]])
    >>> c, s = cos_sin(torch.tensor([1]), torch.tensor([1.0]))
    >>> rotate(x, c, s)
    tensor([[0.5403, 0.8415]])
    """
    if convention not in CONVENTIONS:
        raise PatchError(f"rotary convention {convention!r} is unknown; expected one of {CONVENTIONS}")
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise PatchError(f"cannot rotate {2 * half} dimensions of a head that has {x.shape[-1]}")
    pairing, _, last = convention.partition("_")
    start = x.shape[-1] - 2 * half if last else 0
    before, rotated, behind = x[..., :start], x[..., start : start + 2 * half], x[..., start + 2 * half :]
    if pairing == "half":
        first, second = rotated[..., :half], rotated[..., half:]
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    a, b = first * cos - second * sin, second * cos + first * sin
    turned = torch.cat((a, b), dim=-1) if pairing == "half" else torch.stack((a, b), dim=-1).flatten(-2)
    turned = turned.to(x.dtype)
    return turned if turned.shape[-1] == x.shape[-1] else torch.cat((before, turned, behind), dim=-1)
