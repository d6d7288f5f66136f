"""Float64 references of decoders: the stock model with its own positions off and a dense attention, written out here, in every layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.reference import rotary_scores


Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _three(attention: Any, hidden: torch.Tensor, heads: int, keys: int) -> tuple[torch.Tensor, ...]:
    """Three projections."""
    return (
        _heads(attention.q_proj(hidden), heads),
        _heads(attention.k_proj(hidden), keys),
        _heads(attention.v_proj(hidden), keys),
    )


def _codegen(attention: Any, hidden: torch.Tensor, heads: int, keys: int) -> tuple[torch.Tensor, ...]:
    """Four blocks of query, value and key."""
    blocks = [block.chunk(3, dim=-1) for block in attention.qkv_proj(hidden).chunk(4, dim=-1)]
    query, value, key = (torch.cat([block[i] for block in blocks], dim=-1) for i in range(3))
    return _heads(query, heads), _heads(key, heads), _heads(value, heads)


def _each_head(attention: Any, hidden: torch.Tensor, heads: int, keys: int) -> tuple[torch.Tensor, ...]:
    """One projection: query, key and value of a head side by side."""
    return tuple(_heads(attention.query_key_value(hidden), heads).chunk(3, dim=-1))


def _falcon(attention: Any, hidden: torch.Tensor, heads: int, keys: int) -> tuple[torch.Tensor, ...]:
    """One projection: all queries, then the one key and the one value."""
    mixed = _heads(attention.query_key_value(hidden), heads + 2)
    return mixed[:, :-2], mixed[:, -2:-1], mixed[:, -1:]


def _table_off(model: Any) -> None:
    for module in model.modules():
        for name in ("wpe", "embed_positions"):
            table = getattr(module, name, None)
            if isinstance(table, torch.nn.Module):
                table.forward = lambda *args, **kwargs: torch.zeros(())


class Kind(SimpleNamespace):
    """How one model type is laid out: its attention modules' name, `split` into heads, the last projection, what it returns, and scale."""


KINDS = {
    "gptj": Kind(name="attn", split=_three, last="out_proj", values=2),
    "codegen": Kind(name="attn", split=_codegen, last="out_proj", values=2),
    "opt": Kind(name="self_attn", split=_three, last="out_proj", values=2),
    "biogpt": Kind(name="self_attn", split=_three, last="out_proj", values=2),
    "bart": Kind(name="self_attn", split=_three, last="out_proj", values=2),
    "xglm": Kind(name="self_attn", split=_three, last="out_proj", values=2),
    "gpt_neo": Kind(name="attention", split=_three, last="out_proj", values=2, scaling=1.0),
    "stablelm": Kind(name="self_attn", split=_three, last="o_proj", values=2),
    "nemotron": Kind(name="self_attn", split=_three, last="o_proj", values=2),
    "falcon": Kind(name="self_attention", split=_falcon, last="dense", values=2),
    "gpt_neox_japanese": Kind(name="attention", split=_each_head, last="dense", values=3),
}


def dense(model: PreTrainedModel, scores: Scores) -> PreTrainedModel:
    """`model` in float64 without its own positions; `scores` gives the attention logits (1, H, L, L) of queries and keys (1, H, L, D)."""
    kind, model = KINDS[model.config.model_type], model.double()
    heads = model.config.num_attention_heads
    keys = getattr(model.config, "num_key_value_heads", heads)
    _table_off(model)
    for module in model.modules():
        attention = getattr(module, kind.name, None)
        if hasattr(attention, kind.last):
            attention.forward = _forward(attention, kind, heads, keys, scores)
    return model


def _forward(attention: Any, kind: Kind, heads: int, keys: int, scores: Scores) -> Callable:
    window = attention.config.window_size if getattr(attention, "attention_type", "") == "local" else 10**9

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        query, key, value = kind.split(attention, hidden_states, heads, keys)
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        places = torch.arange(query.shape[2])
        distance = places[:, None] - places
        # `scores` divide by the root of the width, as most models do
        scale = getattr(kind, "scaling", query.shape[-1] ** -0.5) * math.sqrt(query.shape[-1])
        logits = scores(query * scale, key).masked_fill((distance < 0) | (distance >= window), -math.inf)
        mixed = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        rest = (None, getattr(attention, "dense_bias", None))[: kind.values - 1]
        return getattr(attention, kind.last)(mixed), *rest

    return forward


def plain(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scaled products."""
    return query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5


def with_bias(bias: torch.Tensor) -> Scores:
    """Scaled products plus a `bias` (H, L, L)."""
    return lambda query, key: plain(query, key) + bias


def turned(frequencies: torch.Tensor | Callable, scale: float = 1.0, interleaved: bool = False) -> Scores:
    """Products of queries and keys turned by `frequencies`, or by those of the length of each query."""

    def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        places = torch.arange(query.shape[2])
        sets = frequencies if callable(frequencies) else lambda length: (frequencies, scale)
        return rotary_scores(query, key, places, places, sets, interleaved)

    return scores
