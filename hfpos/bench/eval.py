"""`perplexity` against the usual loops: time, peak memory, and how far the values differ. On the CPU, ratios."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfpos.bench.memory import peak_bytes
from hfpos.bench.timing import in_turn, ratio
from hfpos.evaluate import perplexity


LONGEST = 4096
WINDOW, STRIDE = 1024, 256


def run() -> dict[str, Any]:
    """One forward for all lengths, sliding windows, and memory at a long context with a large vocabulary."""
    return {
        "one_forward_16_lengths_even": one_forward([LONGEST * part // 16 for part in range(1, 17)]),
        "one_forward_16_lengths_upper_half": one_forward([LONGEST * (16 + part) // 32 for part in range(1, 17)]),
        "sliding": sliding(),
        "long_context": long_context(),
    }


def llama(vocabulary: int, tokens: int) -> LlamaForCausalLM:
    """4 layers, 256 wide, seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        initializer_range=0.06,
    )
    return LlamaForCausalLM(config).eval()


def one_forward(lengths: list[int]) -> dict[str, Any]:
    """Every length of one document: one run with prefix sums, against the model run again for each length."""
    model, ids = llama(2048, LONGEST), torch.randint(0, 2048, (LONGEST,))

    @torch.no_grad()
    def again() -> list[float]:
        found = [model(ids[None, :length], labels=ids[None, :length], use_cache=False).loss for length in lengths]
        return [math.exp(loss) for loss in found]

    def once() -> list[float]:
        return [score.perplexity for score in perplexity(model, [ids], lengths).by_length.values()]

    seconds = in_turn({"again": again, "once": once}, rounds=5)
    return {
        "lengths": lengths,
        # what arithmetic allows, were time proportional to tokens; attention is more than that
        "tokens_again_over_once": round(sum(lengths) / max(lengths), 2),
        "speedup": round(ratio(seconds, "again", "once"), 2),
        "largest_relative_difference": _difference(again(), once()),
    }


def sliding() -> dict[str, Any]:
    """Windows of 1,024 tokens, 256 further each, 32,000 words: against the loop that computes the logits of whole windows."""
    model, ids = llama(32_000, WINDOW), torch.randint(0, 32_000, (1, LONGEST))

    @torch.no_grad()
    def usual() -> list[float]:
        total, scored, end = 0.0, 0, 0
        for begin in range(0, LONGEST, STRIDE):
            stop = min(begin + WINDOW, LONGEST)
            labels = ids[:, begin:stop].clone()
            labels[:, : max(1, end - begin)] = -100
            count = int((labels[:, 1:] != -100).sum())
            total += model(ids[:, begin:stop], labels=labels, use_cache=False).loss.item() * count
            scored, end = scored + count, stop
            if stop == LONGEST:
                break
        return [math.exp(total / scored)]

    def ours() -> list[float]:
        return [perplexity(model, list(ids), [WINDOW], STRIDE).by_length[WINDOW].perplexity]

    seconds = in_turn({"usual": usual, "ours": ours}, rounds=5)
    peaks = {"usual": peak_bytes(usual), "ours": peak_bytes(ours)}
    return {
        "speedup": round(ratio(seconds, "usual", "ours"), 2),
        "peak_memory_ours_over_usual": round(peaks["ours"] / peaks["usual"], 3),
        "largest_relative_difference": _difference(usual(), ours()),
    }


def long_context(tokens: int = 16_384, vocabulary: int = 128_000) -> dict[str, Any]:
    """Peak memory beyond the weights and the KV cache."""
    model, ids = llama(vocabulary, tokens), torch.randint(0, vocabulary, (tokens,))
    peak = peak_bytes(lambda: perplexity(model, [ids], [tokens]))
    cache = 2 * model.config.num_hidden_layers * model.config.hidden_size * tokens * 4
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "peak_megabytes_beyond_weights_and_cache": round((peak - cache) / 1e6),
        "logits_megabytes_if_held_at_once": round(tokens * vocabulary * 4 / 1e6),
    }


def _difference(expected: list[float], found: list[float]) -> float:
    pairs = zip(expected, found, strict=True)
    return max(abs(b / a - 1) for a, b in pairs)
