"""`hfpos plan`: tokens and memory of a recipe, before anything is loaded or launched."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from hfpos.checkpoint import load_skeleton
from hfpos.scheme import PatchError
from hfpos.train.holdings import Layout
from hfpos.train.layouts import read_layout
from hfpos.train.memory import Memory, estimate, size
from hfpos.train.memory_advice import advice, lower
from hfpos.train.model import named_tokenizer, new_model, put_together


if TYPE_CHECKING:
    from torch import nn

    from hfpos.train.recipe import Recipe


ENOUGH_LESS = 0.75  # of what ran out of memory: the estimate may be off, and others may use the device too


@dataclass(frozen=True)
class Plan:
    """What a recipe will take.

    Attributes:
        parameters: of the model.
        trained: how many of them are trained.
        step_tokens: tokens of one optimizer step over all processes.
        total_tokens: of the whole run; None where the recipe counts epochs, whose size only the data tells.
        memory: of each process.
        available: bytes of one device; None where not asked.
        advice: what to change so that it fits.
    """

    parameters: int
    trained: int
    step_tokens: int
    total_tokens: int | None
    memory: Memory
    available: float | None
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether one device has room; True where its size was not given."""
        return self.available is None or self.memory.needed <= self.available

    def __str__(self) -> str:
        total = f", {self.total_tokens:,} in all" if self.total_tokens else ""
        lines = [
            f"{self.parameters:,} parameters, {self.trained:,} of them trained",
            f"{self.step_tokens:,} tokens a step{total}",
            str(self.memory),
        ]
        if self.available is not None:
            verdict = "fits" if self.fits else "does not fit"
            lines.append(f"{verdict} into {size(self.available)}")
        if self.advice:
            lines += ["what to change, one thing on top of the other:", *(f"- {line}" for line in self.advice)]
        return "\n".join(lines)


def plan(
    recipe: Recipe, config: str | Path | None = None, processes: int | None = None, available: float | None = None
) -> Plan:
    """Estimate tokens and memory of a recipe, without weights and without a GPU.

    Args:
        recipe: the model may be a folder or hub name (its config is read) or a new one.
        config: of accelerate, as the run will be launched with; one process unless given.
        processes: instead of the config's.
        available: bytes of one device; then `fits` and `advice` say whether and how it fits.

    Raises:
        PatchError: the model, the scheme or a length does not fit, or the recipe's optimizer is not known.
    """
    layout, mixed = read_layout(config, processes)
    settings = memory_settings(recipe) | {"layout": layout}
    if settings["mixed_precision"] == "no":
        settings["mixed_precision"] = mixed
    model = skeleton(recipe)
    memory = estimate(model, **settings)
    rows = settings["batch_size"] * settings["gradient_accumulation_steps"] * layout.data
    steps = training_value(recipe, "max_steps")
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    return Plan(
        parameters=sum(count for count, _ in sizes),
        trained=sum(count for count, trained in sizes if trained),
        step_tokens=rows * recipe.data.length,
        total_tokens=rows * recipe.data.length * steps if steps > 0 else None,
        memory=memory,
        available=available,
        advice=tuple(advice(model, available, memory, **settings)) if available is not None else (),
    )


def less_memory(recipe: Recipe, layout: Layout, device: torch.device) -> list[str]:
    """What lowers the memory of a recipe that has just run out of it, one thing on top of the other; empty where that cannot be said."""
    settings = memory_settings(recipe) | {"layout": layout, "device": "cpu" if device.type == "cpu" else "cuda"}
    try:
        model = skeleton(recipe)
        memory = estimate(model, **settings)
        return lower(model, memory, ENOUGH_LESS * memory.needed, **settings)[0]
    except PatchError:
        return []


def memory_settings(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `hfpos.train.memory.estimate` that a recipe states."""
    checkpointing = training_value(recipe, "gradient_checkpointing") or training_value(
        recipe, "activation_checkpointing"
    )
    mixed = "bf16" if training_value(recipe, "bf16") else "fp16" if training_value(recipe, "fp16") else "no"
    return {
        "length": recipe.data.length,
        "batch_size": training_value(recipe, "per_device_train_batch_size"),
        "gradient_accumulation_steps": training_value(recipe, "gradient_accumulation_steps"),
        "dtype": None if recipe.model.dtype == "auto" else getattr(torch, recipe.model.dtype),
        "optimizer": str(training_value(recipe, "optim")),
        "mixed_precision": mixed,
        "checkpointing": bool(checkpointing),
        "packed": recipe.data.packing == "documents" and "flash" not in (recipe.model.attn_implementation or ""),
        "weight_bits": None if recipe.model.quantization is None else int(recipe.model.quantization[0]),
        "evaluation_length": None if recipe.evaluation is None else max(recipe.evaluation.lengths),
    }


def training_value(recipe: Recipe, name: str) -> Any:
    """What the recipe says of a training argument, else Transformers' default; None where its version has no such argument."""
    if name in recipe.training:
        return recipe.training[name]
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    if name not in fields:
        return None
    field = fields[name]
    return field.default_factory() if callable(field.default_factory) else field.default


def skeleton(recipe: Recipe) -> nn.Module:
    """The recipe's model, patched and with LoRA, on the meta device."""
    section = recipe.model
    if section.config is None:
        model = load_skeleton(section.path)  # type: ignore[arg-type]
    else:
        words = (
            section.tokenizer if isinstance(section.tokenizer, int) else len(named_tokenizer(str(section.tokenizer)))
        )
        with torch.device("meta"):
            model = new_model(section, {"vocab_size": words})
    return put_together(recipe, model, None)
