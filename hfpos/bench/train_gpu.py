"""The GPU part of `hfpos bench train`: a larger step, and a LLaMA trained from scratch at 1,024 tokens and extended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from hfpos.bench.train_cases import Case, Text
from hfpos.bench.train_quality import extend
from hfpos.bench.train_step import step


# Dense bfloat16 matrix products at most, in FLOP a second, by a part of the device's name (data sheets)
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
# The sources of two large packages that are there anyway; the standard library's held-out files are in neither
_PACKAGES = [next(iter(package.__path__)) for package in (torch, transformers)]
TEXT = Text(
    train=(
        f"data.sources=[{{path: stdlib, split: train}}, {', '.join(f'{{path: {path}}}' for path in _PACKAGES)}]",
        "data.skip_bad=true",
    )
)
_TRAINING = ("training.bf16=true", "training.lr_scheduler_type=cosine", "training.gradient_checkpointing=false")
LLAMA = Case(
    base="base-llama",
    base_changes=(
        "model.config.hidden_size=640",
        "model.config.intermediate_size=1728",
        "model.config.num_hidden_layers=12",
        "model.config.num_attention_heads=10",
        "model.config.num_key_value_heads=10",
        "model.config.max_position_embeddings=1024",
        "model.config.initializer_range=0.02",
        "model.tokenizer=16384",
        "data.length=1024",
        "training.max_steps=2000",
        "training.per_device_train_batch_size=32",
        "training.learning_rate=1e-3",
        "training.warmup_steps=100",
        *_TRAINING,
    ),
    recipe="llama2-7b-yarn-64k",
    changes=(
        "data.length=4096",
        "training.max_steps=100",
        "training.per_device_train_batch_size=8",
        "training.learning_rate=1e-4",
        "training.warmup_steps=10",
        *_TRAINING,
    ),
    control=("scheme=none", "data.length=1024", "training.per_device_train_batch_size=32"),
    schemes=("linear", "ntk", "yarn"),
)
FAR = (
    "scheme={name: yarn, factor: 16}",
    "data.length=16384",
    "training.per_device_train_batch_size=2",
)
BILLION = LlamaConfig(
    hidden_size=2048, intermediate_size=5504, num_hidden_layers=16, num_attention_heads=16, vocab_size=32_000
)


def run(
    folder: Path,
    case: Case = LLAMA,
    text: Text = TEXT,
    far: tuple[str, ...] = FAR,
    config: LlamaConfig = BILLION,
    tokens: int = 8192,
) -> dict[str, Any]:
    """The step and both extensions; the second uses the first one's base model.

    Args:
        folder: for the base model.
        far: changes of the recipe for 16 times the trained length.
        config: of the model of the step, 0.9 billion parameters.
        tokens: of the step.
    """
    found = step(tokens, lambda: seeded(config), bf16=True)
    near = extend("gpu-llama", case, folder, text)
    longer = replace(case, changes=(*case.changes, *far), factor=16)
    return {
        "step": found | {"mfu": mfu(found["hfpos_tokens_a_second"], config, tokens)},
        "base_mfu": mfu(near["base"]["tokens_a_second"], base_config(folder / "gpu-llama"), near["trained_length"]),
        "4x": near,
        "16x": extend("gpu-llama", longer, folder, text),
    }


def seeded(config: LlamaConfig) -> LlamaForCausalLM:
    """The same weights each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def base_config(folder: Path) -> LlamaConfig:
    """Of the model that was trained there."""
    return LlamaConfig.from_pretrained(folder / "model")


def mfu(tokens_a_second: float, config: LlamaConfig, tokens: int) -> float | None:
    """Model FLOPs utilisation: the share of the device's peak that the model's own arithmetic takes; None on a device not in `PEAKS`."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAKS.items() if part in name), None)
    return None if peak is None else round(tokens_a_second * flops_a_token(config, tokens) / peak, 4)


def flops_a_token(config: LlamaConfig, tokens: int) -> int:
    """Of a forward and a backward, per token of a row of so many: 6 for each weight that multiplies, and causal attention's two products,
    half of their entries. What gradient checkpointing computes again does not count.

    >>> config = LlamaConfig(
    ...     vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    ... )
    >>> flops_a_token(config, tokens=4) == 6 * (2 * (4 * 8 * 8 + 3 * 8 * 16) + 10 * 8) + 6 * 2 * 8 * 4
    True
    """
    sizes: Any = config  # Transformers types sizes that it fills in as optional
    width, keys = sizes.hidden_size, sizes.num_key_value_heads * sizes.head_dim
    layer = 2 * width * width + 2 * width * keys + 3 * width * sizes.intermediate_size
    weights = config.num_hidden_layers * layer + config.vocab_size * width
    return 6 * weights + 6 * config.num_hidden_layers * width * tokens
