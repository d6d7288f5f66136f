"""Tiny seeded models for tests: two layers, width 64, 4 heads on 2 key heads, 64 positions, nothing at its default value."""

from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hfpos.bench.shrink import tiny_model


def tiny(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The causal language model of `model_type`, float32, in eval mode; `overrides` go to its config.

    >>> model = tiny("llama", num_hidden_layers=1)
    >>> model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.max_position_embeddings
    (1, 2, 64)
    """
    return tiny_model(getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]), seed, **overrides)
