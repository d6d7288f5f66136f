"""Attention with a bias against plain causal attention, the bias written out, and float64: time, peak memory, error.

One layer's attention on the CPU, batch 1, 12 heads of 64, without projections; on a GPU `gpu.py` too. Times are ratios to plain
causal SDPA, which has no bias and is the limit.

| contender | what it is |
|---|---|
| `alibi`, `kerple`, ... | what a model patched with that scheme does |
| `alibi_flex` | the same, made to use flex_attention; forward only, as that has no backward on a CPU; absent where it does not compile |
| `alibi_dense` | the bias (1, H, Q, K) as Transformers' `position_bias`, made in the call |
| `alibi_dense_made_before` | the same, made before, as the first of many layers does it for the others |
| `alibi_eager` | Transformers' eager attention, the bias in its mask, made before |
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor.exc import InductorError

from hfpos.bench import attention_error, gpu
from hfpos.bench.contenders import Contender, Layer, biased, by_extra_dimensions, dense, eager, plain
from hfpos.bench.memory import peak_bytes
from hfpos.bench.timing import in_turn, ratio
from hfpos.scheme import Bias
from hfpos.schemes.alibi import Alibi
from hfpos.schemes.fire import Fire
from hfpos.schemes.kerple import Kerple
from hfpos.schemes.sandwich import Sandwich
from hfpos.schemes.shaw import Shaw
from hfpos.schemes.t5 import T5


# tokens -> rounds of forward, and of forward and backward: few where one takes many seconds
ROUNDS = {1024: (9, 5), 2048: (7, 3), 4096: (5, 3), 8192: (3, 1), 16_384: (2, 2)}
WRITTEN_OUT = 4096  # tokens up to which the bias is written out, for a comparison
FLEX = 8192  # tokens up to which flex_attention is run
LEARNING = 8192  # tokens up to which KERPLE's backward is run
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run() -> dict[str, Any]:
    """Everything that the CPU can do; on a GPU, that too."""
    results: dict[str, Any] = {
        "speed": {
            name: {tokens: speed(tokens, dtype, *rounds) for tokens, rounds in ROUNDS.items()}
            for name, dtype in DTYPES.items()
        },
        "other_schemes_float32_4096": other_schemes(4096),
        "peak_memory_over_plain_16384": peak_memory(16_384),
        "decode_step_over_plain_8192": {
            f"{name}_{key_heads}_key_heads": decode_step(8192, dtype, key_heads)
            for name, dtype in DTYPES.items()
            for key_heads in (12, 4)
        },
        "kerple_training_float32_4096": training(4096),
        "error_4096": {name: error(4096, scheme) for name, scheme in (("alibi", Alibi()), ("kerple", Kerple()))},
        "error_float32_steepest_slope": steepest_slope((512, 2048, 8192, 32_768, 131_072)),
        "attention_total_variation_bfloat16_8192": total_variation(8192, heads=32),
    }
    if torch.cuda.is_available():
        results["gpu"] = gpu.run()
    return results


def speed(tokens: int, dtype: torch.dtype, forward: int, backward: int) -> dict[str, Any]:
    """Ratios to plain attention after so many rounds `forward`, and `backward` of forward and backward together."""
    layer = Layer(tokens, dtype)
    quick = {"plain": plain(layer), "alibi": biased(layer, Alibi()), "kerple": biased(layer, Kerple())}
    flex = by_flex(layer) if tokens <= FLEX else {}
    warmup = int(tokens <= WRITTEN_OUT)  # beyond, the shorter ones have been that
    found = {"forward": over_plain(quick | flex, "forward", forward, warmup)}
    if tokens > LEARNING:
        del quick["kerple"]
    found["forward_backward"] = over_plain(quick, "forward_backward", backward, warmup)
    if tokens <= WRITTEN_OUT:  # in rounds of their own, fewer: they take many times as long
        slow = {
            "plain": plain(layer),
            "alibi_dense": dense(layer, Alibi()),
            "alibi_dense_made_before": dense(layer, Alibi(), made_before=True),
            "alibi_eager": eager(layer, Alibi()),
        }
        for what, ratios in found.items():
            found[what] = over_plain(slow, what, max(backward // 2, 1), warmup=0) | ratios
    return found


def by_flex(layer: Layer) -> dict[str, Contender]:
    """ALiBi by flex_attention; nothing where PyTorch cannot compile that, for lack of a C++ compiler or by a fault of its own."""
    contender = biased(layer, Alibi(), "flex_attention")
    try:
        contender.forward()
    except InductorError:
        return {}
    return {"alibi_flex": contender}


def over_plain(contenders: dict[str, Contender], what: str, rounds: int, warmup: int = 1) -> dict[str, float]:
    """`what`, a method of `Contender`, timed: ratios to the contender `plain`, and the median seconds of that one."""
    seconds = in_turn({name: getattr(each, what) for name, each in contenders.items()}, rounds, warmup)
    ratios = {name: round(ratio(seconds, name, "plain"), 3) for name in contenders if name != "plain"}
    return {"plain_seconds": round(statistics.median(seconds["plain"]), 5), **ratios}


def other_schemes(tokens: int, rounds: int = 2) -> dict[str, float]:
    """The forward in float32 of the schemes that are not in `speed`."""
    layer = Layer(tokens)
    schemes: tuple[Bias, ...] = (T5(), Fire(), Shaw(), Sandwich())
    contenders = {scheme.name: biased(layer, scheme) for scheme in schemes}
    return over_plain({"plain": plain(layer), **contenders}, "forward", rounds)


def peak_memory(tokens: int, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Of the forward, beyond queries, keys and values; the output is part of it."""
    peaks: dict[str, int] = {}
    for size in (min(tokens, 512), tokens):  # the short one first, for what is made once
        layer = Layer(size, dtype)
        contenders = {"plain": plain(layer), "alibi": biased(layer, Alibi()), "kerple": biased(layer, Kerple())}
        peaks = {name: peak_bytes(each.forward) for name, each in contenders.items()}
    ratios = {name: round(peak / peaks["plain"], 3) for name, peak in peaks.items() if name != "plain"}
    return {"plain_megabytes": round(peaks["plain"] / 1e6, 1), **ratios}


def decode_step(cached: int, dtype: torch.dtype, key_heads: int, rounds: int = 100) -> dict[str, float]:
    """One query, at the end of `cached` keys and its own."""
    layer = Layer(cached + 1, dtype, key_heads=key_heads, queries=1)
    contenders = {"plain": plain(layer), "alibi": biased(layer, Alibi()), "kerple": biased(layer, Kerple())}
    return over_plain(contenders, "forward", rounds, warmup=5)


def training(tokens: int, rounds: int = 2) -> dict[str, float]:
    """Forward and backward of KERPLE with its learned weights, against the bias written out and made in each call, as ours is."""
    layer = Layer(tokens)
    contenders = {"kerple": biased(layer, Kerple()), "kerple_dense": dense(layer, Kerple())}
    seconds = in_turn({name: each.forward_backward for name, each in contenders.items()}, rounds, warmup=0)
    peaks = {name: peak_bytes(each.forward_backward) for name, each in contenders.items()}
    return {
        "seconds_over_dense": round(ratio(seconds, "kerple", "kerple_dense"), 3),
        "peak_memory_over_dense": round(peaks["kerple"] / peaks["kerple_dense"], 3),
        "dense_megabytes": round(peaks["kerple_dense"] / 1e6),
    }


def error(tokens: int, scheme: Bias) -> dict[str, dict[str, dict[str, float]]]:
    """Against float64, of the output and the gradients, by dtype: `cpu`, the GPU's form where there is one, and the bias written out."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    expected: dict[str, torch.Tensor] | None = None
    for name, dtype in DTYPES.items():
        layer = Layer(tokens, dtype)
        contenders = {"cpu": biased(layer, scheme), "dense": dense(layer, scheme)}
        if isinstance(scheme, Alibi):
            contenders["extra_dimensions"] = by_extra_dimensions(layer, scheme)
        if expected is None:  # the numbers are the same in each dtype
            expected = attention_error.reference(layer, scheme, contenders["cpu"].weights)
        found[name] = {form: _rounded(attention_error.errors(each, expected)) for form, each in contenders.items()}
    return found


def steepest_slope(lengths: Sequence[int]) -> dict[str, dict[int, float]]:
    """`attention_error.steepest_slope` at each of `lengths`, for what a CPU and what a GPU does."""
    return {
        form: _rounded({tokens: attention_error.steepest_slope(tokens, form) for tokens in lengths})
        for form in attention_error.FORMS
    }


def total_variation(tokens: int, heads: int) -> dict[str, float]:
    """`attention_error.total_variation` in bfloat16, of what a CPU and a GPU does and of stock BLOOM."""
    return _rounded(attention_error.total_variation(Layer(tokens, torch.bfloat16, heads=heads)))


def _rounded(values: dict[Any, float]) -> dict[Any, float]:
    return {name: float(f"{value:.3g}") for name, value in values.items()}
