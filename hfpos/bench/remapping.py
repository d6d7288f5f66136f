"""Attention of the schemes that act on each pair of a query and a key, against plain causal attention: time and peak memory.

One layer's attention on the CPU, batch 1, 12 heads of 64, without projections, of a model trained at a quarter of the length. The rotation of
queries and keys is part of each scheme's time and not of plain attention's, which comes rotated. Times are ratios to plain causal SDPA, in turn
in one process.
"""

from __future__ import annotations

from typing import Any

import torch

from hfpos.bench.attention import DTYPES, over_plain
from hfpos.bench.contenders import Contender, Layer, alone, plain
from hfpos.bench.memory import peak_bytes
from hfpos.schemes.dual_chunk import DualChunk
from hfpos.schemes.lm_infinite import LMInfinite
from hfpos.schemes.rerope import ReRope
from hfpos.schemes.self_extend import SelfExtend
from hfpos.schemes.streaming_llm import StreamingLLM
from hfpos.schemes.xpos import XPos


ROUNDS = {2048: (9, 3), 8192: (3, 1)}  # tokens -> rounds of forward, and of forward and backward


def run() -> dict[str, Any]:
    """Everything that the CPU can do."""
    return {
        "speed_over_plain": {
            name: {tokens: speed(tokens, dtype, *rounds) for tokens, rounds in ROUNDS.items()}
            for name, dtype in DTYPES.items()
        },
        "peak_memory_over_plain": {tokens: peak_memory(tokens) for tokens in (4096, 16_384)},
        "decode_step_over_plain_8192": decode_step(8192),
    }


def contenders(layer: Layer) -> dict[str, Contender]:
    """Plain attention, and every scheme as on a model trained at a quarter of the layer's length."""
    tokens = layer.k_positions.shape[1]
    original = max(tokens // 4, 8)
    schemes = {
        "self_extend": SelfExtend(original_length=original, target_length=tokens),
        "rerope": ReRope(original_length=original),
        "rerope_leaky": ReRope(original_length=original, factor=8),
        "dual_chunk": DualChunk(original_length=original),
        "lm_infinite": LMInfinite(original_length=original),
        "streaming_llm": StreamingLLM(original_length=original),
        "xpos": XPos(),
    }
    return {"plain": plain(layer)} | {name: alone(layer, scheme) for name, scheme in schemes.items()}


def speed(tokens: int, dtype: torch.dtype, forward: int, backward: int) -> dict[str, Any]:
    """Ratios to plain attention after so many rounds `forward`, and `backward` of forward and backward together."""
    layer = Layer(tokens, dtype)
    rounds = {"forward": forward, "forward_backward": backward}
    return {what: over_plain(contenders(layer), what, count) for what, count in rounds.items()}


def peak_memory(tokens: int) -> dict[str, float]:
    """Of the forward in float32, beyond queries, keys and values; the output is part of it."""
    peaks: dict[str, int] = {}
    for size in (512, tokens):  # the short one first, for what is made once
        layer = Layer(size)
        peaks = {name: peak_bytes(each.forward) for name, each in contenders(layer).items()}
    ratios = {name: round(peak / peaks["plain"], 3) for name, peak in peaks.items() if name != "plain"}
    return {"plain_megabytes": round(peaks["plain"] / 1e6, 1), **ratios}


def decode_step(cached: int, rounds: int = 30) -> dict[str, float]:
    """One query in float32, at the end of `cached` keys and its own, all of which are rotated in the step."""
    layer = Layer(cached + 1, queries=1)
    return over_plain(contenders(layer), "forward", rounds, warmup=3)
