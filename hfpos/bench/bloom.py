"""BLOOM after `patch(model, "alibi")` against stock BLOOM on the CPU: time, peak memory, and how far each is off in bfloat16.

Measured as a whole model, as the attention of its first layer, and as the same without its two projections, which cost both alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

import hfpos
from hfpos.bench.memory import peak_bytes
from hfpos.bench.timing import in_turn, ratio


TOKENS = 4096
ATTENTION = ("attention", "attention_without_projections")
Calls = dict[str, Callable[[], torch.Tensor]]


def run() -> dict[str, Any]:
    """4 layers, 512 wide, 8 heads; and a layer of a real size, 4,096 wide, 32 heads of 128. 4,096 tokens, on the CPU."""
    small = BloomConfig(vocab_size=1024, hidden_size=512, n_layer=4, n_head=8)
    real = BloomConfig(vocab_size=1024, hidden_size=4096, n_layer=1, n_head=32)
    return {
        "tokens": TOKENS,
        "4_layers_512_wide": compare(small, TOKENS, ("model", *ATTENTION)),
        "real_layer_4096_wide": compare(real, TOKENS, ATTENTION, rounds=2),
    }


def compare(config: BloomConfig, tokens: int, parts: Sequence[str], rounds: int = 5) -> dict[str, dict[str, Any]]:
    """Stock against patched in each of `parts`: `model`, `attention` or `attention_without_projections`."""
    stock = _stock(config)
    models = {"stock": stock, "patched": hfpos.patch(copy.deepcopy(stock), "alibi")}
    ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        calls = {name: outputs(model, ids) for name, model in models.items()}
        found = {part: cost({name: each[part] for name, each in calls.items()}, rounds) for part in parts}
        exact = {part: calls["stock"][part]() for part in parts}
        for part in parts:
            difference = calls["patched"][part]() - exact[part]
            found[part]["float32_largest_difference"] = difference.abs().max().item()
        halves = {
            "stock": copy.deepcopy(stock).bfloat16(),
            "patched": hfpos.patch(stock.bfloat16(), "alibi"),  # `stock` itself, as nobody needs it any more
        }
        narrow = {name: outputs(model, ids) for name, model in halves.items()}
        for part in parts:
            distance = {name: _distance(each[part](), exact[part]) for name, each in narrow.items()}
            found[part]["bfloat16_relative_distance_to_float32"] = {k: round(v, 5) for k, v in distance.items()}
            found[part]["bfloat16_distance_patched_over_stock"] = round(distance["patched"] / distance["stock"], 3)
    return found


def outputs(model: BloomForCausalLM, ids: torch.Tensor) -> Calls:
    """What computes the output of each part of `model` on the tokens `ids`.

    Of the model the hidden states, not the logits: the language-model head is the same in both and would hide the difference. Of the
    attention what it adds to the residual, on what its first call of a forward is given.
    """

    def whole() -> torch.Tensor:
        return model.transformer(ids, use_cache=False).last_hidden_state

    attention: Any = model.transformer.h[0].self_attention
    given: list[tuple[tuple, dict[str, Any]]] = []
    hook = attention.register_forward_pre_hook(lambda _, *call: given.append(call), with_kwargs=True)
    whole()
    hook.remove()
    (hidden, residual), options = given[0]
    nothing = torch.zeros_like(residual)
    bare = copy.copy(attention)
    bare._modules = dict(attention._modules)
    bare.query_key_value = Given(attention.query_key_value(hidden))
    bare.dense = nn.Identity()
    return {
        "model": whole,
        "attention": lambda: attention(hidden, nothing, **options)[0],
        "attention_without_projections": lambda: bare(hidden, nothing, **options)[0],
    }


class Given(nn.Module):
    """Stands in for a projection: hands out what that has worked out before."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """The same every time."""
        return self.output


def cost(calls: Calls, rounds: int) -> dict[str, Any]:
    """Time and peak memory of `stock` and `patched`."""
    seconds = in_turn(calls, rounds)
    peaks = {name: peak_bytes(call) for name, call in calls.items()}
    return {
        "speedup": round(ratio(seconds, "stock", "patched"), 2),
        "stock_seconds": round(min(seconds["stock"]), 3),
        "peak_memory_patched_over_stock": round(peaks["patched"] / peaks["stock"], 3),
        "stock_megabytes": round(peaks["stock"] / 1e6, 1),
    }


def _stock(config: BloomConfig) -> BloomForCausalLM:
    torch.manual_seed(0)
    stock = BloomForCausalLM(config).eval()
    for name, parameter in stock.named_parameters():
        if parameter.ndim == 2 and "embeddings" not in name:
            # sharper attention than at initialisation, where a bias hardly matters
            nn.init.normal_(parameter, std=0.05 * (512 / config.hidden_size) ** 0.5)
    return stock


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()
