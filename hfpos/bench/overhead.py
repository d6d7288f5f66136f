"""What a patch costs: per forward for schemes of the freq seam, and `patch()` itself on a 7B-sized model."""

from __future__ import annotations

import copy
import time
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hfpos
from hfpos.bench.timing import in_turn, ratio


TOKENS = 2048


def run() -> dict[str, Any]:
    """Time a 4-layer LLaMA at 2,048 tokens, stock and patched; and `patch()` on a 32-layer, 4,096-wide one on the meta device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=TOKENS // 4,
    )
    stock = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 1024, (1, TOKENS))
    models = {"stock": stock}
    for scheme in ("linear", "ntk", "yarn", "llama3"):
        models[scheme] = hfpos.patch(copy.deepcopy(stock), scheme, factor=4)
    with torch.no_grad():
        seconds = in_turn({name: partial(model, ids, use_cache=False) for name, model in models.items()}, rounds=15)
    forward = {name: round(ratio(seconds, name, "stock"), 3) for name in models if name != "stock"}
    return {"tokens": TOKENS, "forward_patched_over_stock": forward, "patch_32_layers_meta_seconds": _patch_seconds()}


def _patch_seconds() -> dict[str, float]:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, num_hidden_layers=32))
    seconds = {}
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("yarn", {"factor": 4}),
        ("dynamic", {"factor": 4}),
        ("alibi", {}),
    )
    for scheme, parameters in cases:
        start = time.perf_counter()
        hfpos.patch(model, scheme, **parameters)
        seconds[scheme] = round(time.perf_counter() - start, 4)
        hfpos.unpatch(model)
    return seconds
