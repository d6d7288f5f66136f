"""The schemes that see keys from other places, written out pair by pair in float64: the oracle of what attention must compute.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch

import hfpos
from hfpos.rotation import inverse_frequencies


ORIGINAL = 32
# Every boundary is within reach of a short text, and no number divides another.
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "self_extend": ("self_extend", {"group_size": 4, "window": 9}),
    "rerope": ("rerope", {"window": 7}),
    "leaky": ("rerope", {"window": 7, "factor": 3.5}),
    "unscaled": ("rerope", {"window": 7, "log_scaling": False}),
    "dual_chunk": ("dual_chunk", {"chunk_size": 13, "local": 5}),
    "dual_chunk_whole": ("dual_chunk", {"chunk_size": 6, "local": 6}),
    "lm_infinite": ("lm_infinite", {"window": 9, "sinks": 3}),
    "streaming_llm": ("streaming_llm", {"window": 9, "sinks": 3}),
    "xpos": ("xpos", {"scale_base": 9}),
}


def build(name: str) -> Any:
    """The scheme of one of the names of `SCHEMES`, for use without a model."""
    scheme, parameters = SCHEMES[name]
    length = {} if scheme == "xpos" else {"original_length": ORIGINAL}
    return hfpos.schemes()[scheme].create(**parameters, **length)


def seen_at(name: str, i: torch.Tensor, j: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far away queries at `i` see keys at `j` (broadcast), float64, and whether they do."""
    scheme, given = SCHEMES[name]
    plain, shown = i - j, torch.ones_like(i - j, dtype=torch.bool)
    if scheme == "xpos":
        return plain.double(), shown
    if scheme == "dual_chunk":
        size = given["chunk_size"]
        last = size + given["local"] - 1
        chunks = i // size - j // size
        there = torch.where(chunks == 1, (i % size + size).clamp(max=last), last)
        return (torch.where(chunks <= 0, i % size, there) - j % size).double(), shown
    window = given["window"]
    if scheme == "self_extend":
        far = i // given["group_size"] + window - window // given["group_size"] - j // given["group_size"]
    elif scheme == "rerope":
        far = window + (plain - window).double() / given.get("factor", math.inf)
    elif scheme == "lm_infinite":
        far = torch.full_like(plain, window)
    else:
        far = i.clamp(max=given["sinks"] + window - 1) - j
    if "sinks" in given:
        shown = (plain < window) | (j < given["sinks"])
    return torch.where(plain < window, plain.double(), far.double()), shown


def scores(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    i: torch.Tensor,
    j: torch.Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> torch.Tensor:
    """Unscaled logits (..., Q, K), float64, of q (..., Q, D) at `i` (Q,) and k (..., K, D) at `j` (K,); -inf where a key is not seen."""
    distance, shown = seen_at(name, i[:, None], j)
    width = q.shape[-1] if rotary_dim is None else rotary_dim
    q, k = q.double(), k.double()
    if SCHEMES[name][0] == "rerope" and SCHEMES[name][1].get("log_scaling", True):
        q = q * ((i + 1).double().log() / math.log(ORIGINAL)).clamp(min=1)[:, None]
    pairs = [
        torch.complex(x[..., 0:width:2], x[..., 1:width:2])
        if interleaved
        else torch.complex(x[..., : width // 2], x[..., width // 2 : width])
        for x in (q, k)
    ]
    angles = distance[..., None] * inverse_frequencies(10_000.0, width)
    sizes = torch.ones_like(angles)
    if name == "xpos":
        zeta = torch.tensor([(2 * p / width + 0.4) / 1.4 for p in range(width // 2)], dtype=torch.float64)
        sizes = zeta ** (distance.clamp(min=0)[..., None] / SCHEMES[name][1]["scale_base"])
    turned = torch.einsum("...qr,...kr,qkr->...qk", pairs[0], pairs[1].conj(), torch.polar(sizes, angles)).real
    return (turned + q[..., width:] @ k[..., width:].mT).masked_fill(~shown, float("-inf"))


def attention(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The output (B, H, Q, D), float64, of q (B, H, Q, D), the last of the tokens of k and v (B, Hkv, K, D).

    Args:
        positions: (K,) of all tokens; counted unless given.
        visible: (Q, K) beside causality.
        options: as for `scores`.
    """
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    positions = torch.arange(keys) if positions is None else positions
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    seen = seen if visible is None else seen & visible
    logits = scores(name, q, k, positions[keys - queries :], positions, **options) * q.shape[-1] ** -0.5
    return logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def tensors(*shape: int, queries: int | None = None, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Queries with twice as many heads as the keys and values of `shape` (B, Hkv, K, D) have, differentiable."""
    generator = torch.Generator().manual_seed(sum(shape))
    rows, heads, keys, width = shape
    shapes = (rows, 2 * heads, queries or keys, width), shape, shape
    return [torch.randn(*each, generator=generator).to(dtype).requires_grad_() for each in shapes]
