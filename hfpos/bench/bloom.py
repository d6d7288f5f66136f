"""BLOOM after `patch(model, "alibi")` against stock BLOOM: time, peak memory, and how far each is off in bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import BloomConfig, BloomForCausalLM

import hfpos
from hfpos.bench.memory import peak_bytes
from hfpos.bench.timing import in_turn, ratio


TOKENS = 4096


def run() -> dict[str, Any]:
    """4 layers, 512 wide, 8 heads, 4,096 tokens, on the CPU."""
    torch.manual_seed(0)
    stock = BloomForCausalLM(BloomConfig(vocab_size=1024, hidden_size=512, n_layer=4, n_head=8)).eval()
    for name, parameter in stock.named_parameters():
        if parameter.ndim == 2 and "embeddings" not in name:
            torch.nn.init.normal_(
                parameter, std=0.05
            )  # sharper attention than at initialisation, where a bias hardly matters
    patched = hfpos.patch(copy.deepcopy(stock), "alibi")
    ids = torch.randint(0, 1024, (1, TOKENS))
    with torch.no_grad():
        # the hidden states, not the logits: the language-model head is the same in both and would hide the difference
        calls = {
            "stock": lambda: stock.transformer(ids, use_cache=False).last_hidden_state,
            "patched": lambda: patched.transformer(ids, use_cache=False).last_hidden_state,
        }
        seconds = in_turn(calls, rounds=5)
        peaks = {name: peak_bytes(call) for name, call in calls.items()}
        exact, float32 = (calls[name]() for name in ("stock", "patched"))
        halves = {
            "stock": copy.deepcopy(stock).bfloat16(),
            "patched": hfpos.patch(copy.deepcopy(stock).bfloat16(), "alibi"),
        }
        distance = {
            name: (
                (model.transformer(ids, use_cache=False).last_hidden_state.float() - exact).norm() / exact.norm()
            ).item()
            for name, model in halves.items()
        }
    return {
        "tokens": TOKENS,
        "speedup": round(ratio(seconds, "stock", "patched"), 2),
        "peak_memory_patched_over_stock": round(peaks["patched"] / peaks["stock"], 3),
        "float32_largest_difference": (float32 - exact).abs().max().item(),
        "bfloat16_relative_distance_to_float32": {name: round(value, 5) for name, value in distance.items()},
        "bfloat16_distance_patched_over_stock": round(distance["patched"] / distance["stock"], 3),
    }
