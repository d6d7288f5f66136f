"""Attention with a bias on a GPU, against causal flash attention without one: time, peak memory, error, and whether 131,072 tokens fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hfpos.bench import attention_error
from hfpos.bench.contenders import Contender, Layer, biased, plain
from hfpos.bench.memory import peak_bytes
from hfpos.bench.timing import in_turn, ratio
from hfpos.scheme import Bias
from hfpos.schemes.alibi import Alibi
from hfpos.schemes.fire import Fire
from hfpos.schemes.kerple import Kerple
from hfpos.schemes.t5 import T5


WAYS: tuple[tuple[Bias, str], ...] = (
    (Alibi(), "sdpa"),
    (Alibi(), "flex_attention"),
    (Alibi(), "flash_attention_2"),
    (Kerple(), "flex_attention"),
    (T5(), "flex_attention"),
    (Fire(), "sdpa"),
)


def run(tokens: int = 32_768, most: int = 131_072, checked: int = 4096, device: str = "cuda") -> dict[str, Any]:
    """32 heads of 128 in bfloat16: cost at `tokens`, whether `most` fit, and errors at `checked`."""

    def layer(length: int) -> Layer:
        return Layer(length, torch.bfloat16, heads=32, head_dim=128, device=device)

    return {
        "tokens": tokens,
        **compare(contenders(layer(tokens))),
        f"forward_backward_gigabytes_{most}": room(contenders(layer(most))),
        f"error_{checked}": error(layer(checked)),
    }


def contenders(layer: Layer) -> dict[str, Contender]:
    """Plain causal flash attention, and each scheme by each backend that suits it and is installed."""
    found = {"plain": flash(layer)}
    for scheme, backend in WAYS:
        if backend != "flash_attention_2" or importlib.util.find_spec("flash_attn") is not None:
            found[f"{scheme.name}_{backend}"] = biased(layer, scheme, backend)
    return found


def flash(layer: Layer) -> Contender:
    """Plain causal attention by PyTorch's flash kernel and no other."""
    own = plain(layer)

    def output() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return own.output()

    return own._replace(output=output)


def compare(found: dict[str, Contender], rounds: int = 7) -> dict[str, Any]:
    """Ratios of time and peak memory to the contender `plain`, of the forward and of forward and backward."""
    results: dict[str, Any] = {}
    for what in ("forward", "forward_backward"):
        calls: dict[str, Callable[[], object]] = {name: getattr(each, what) for name, each in found.items()}
        seconds = in_turn(calls, rounds, warmup=2)
        peaks = {name: peak_bytes(call, found[name].layer.query.device) for name, call in calls.items()}
        others = [name for name in found if name != "plain"]
        results[what] = {
            "plain_milliseconds": round(1e3 * sorted(seconds["plain"])[rounds // 2], 3),
            "time_over_plain": {name: round(ratio(seconds, name, "plain"), 3) for name in others},
            "plain_megabytes": round(peaks["plain"] / 1e6, 1),
            "peak_memory_over_plain": {name: round(peaks[name] / peaks["plain"], 3) for name in others},
        }
    return results


def room(found: dict[str, Contender]) -> dict[str, float | None]:
    """Peak memory of forward and backward beyond queries, keys and values, in gigabytes; None where it does not fit."""
    peaks: dict[str, float | None] = {}
    for name, each in found.items():
        try:
            peaks[name] = round(peak_bytes(each.forward_backward, each.layer.query.device) / 1e9, 2)
        except torch.OutOfMemoryError:
            peaks[name] = None
    return peaks


def error(layer: Layer) -> dict[str, dict[str, float]]:
    """Of ALiBi and KERPLE by each backend, against float64."""
    found: dict[str, dict[str, float]] = {}
    schemes: tuple[Bias, ...] = (Alibi(), Kerple())
    for scheme in schemes:
        ways = {name: each for name, each in contenders(layer).items() if name.startswith(scheme.name)}
        expected = attention_error.reference(layer, scheme, next(iter(ways.values())).weights)
        found |= {name: attention_error.errors(each, expected) for name, each in ways.items()}
    return found
