"""`TrainingArguments` of a recipe: what it says, and our defaults where it says nothing."""

from __future__ import annotations

import dataclasses
import os
from importlib.util import find_spec
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from hfpos.scheme import PatchError
from hfpos.train.recipe import Recipe


# The metric by which checkpoints are compared: the perplexity at the longest length, infinite where the short-context gate fails.
SCORE = "score"
_OLD_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Build them; this also joins the processes that accelerate has launched.

    Raises:
        PatchError: values that Transformers refuses.
    """
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    given = {_name(key, known): _word(key, value) for key, value in recipe.training.items()}
    _check_kinds(recipe.training)
    checkpointing = _name("gradient_checkpointing", known)
    defaults: dict[str, Any] = {
        "dataloader_drop_last": True,  # a last batch with fewer samples would make a step of its own
        "logging_nan_inf_filter": False,  # a loss that is not a number stops the run instead
        "logging_steps": 10,
        "remove_unused_columns": False,
        "report_to": "tensorboard" if find_spec("tensorboard") else "none",
        "save_total_limit": 2,
        "use_cpu": not torch.accelerator.is_available(),
        "seed": recipe.data.seed,
    }
    if given.get(checkpointing):
        defaults[f"{checkpointing}_kwargs"] = {"use_reentrant": False}
    if recipe.evaluation is not None:
        defaults |= {"metric_for_best_model": f"eval_{SCORE}", "greater_is_better": False}
    try:
        arguments = TrainingArguments(**(defaults | given))
    except (TypeError, ValueError, ImportError) as error:
        raise PatchError(f"training: {' '.join(str(error).split())}") from error
    if not torch.accelerator.is_available():
        _shard_on_cpus_too()
        _join_deepspeed_on_cpus()
    return arguments


def _check_kinds(given: dict[str, Any]) -> None:
    """`TrainingArguments` takes anything; a text for a number would fail somewhere in training, one for a truth value would be true."""
    kinds: dict[Any, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"),
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
    }
    hints = get_type_hints(TrainingArguments)
    for name, value in given.items():
        types = set(get_args(hints[name]) or (hints[name],))
        kind = next(iter(types - {NoneType})) if len(types - {NoneType}) == 1 else None
        if kind not in kinds or (value is None and NoneType in types):
            continue
        allowed, expected = kinds[kind]
        if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
            raise PatchError(f"training.{name}={value!r}; expected {expected}")


def _shard_on_cpus_too() -> None:
    """Accelerate takes FSDP for accelerators alone and falls back to DDP on CPUs without a word; torch's own FSDP2 runs on both."""
    shared = PartialState._shared_state
    if wants_fsdp() and shared.get("distributed_type") == DistributedType.MULTI_CPU:
        shared["distributed_type"] = DistributedType.MULTI_GPU


def _join_deepspeed_on_cpus() -> None:
    """Accelerate joins CPU processes without DeepSpeed, whose own communication then finds that it was never begun."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true" or not torch.distributed.is_initialized():
        return
    import deepspeed

    # a faster way among CPUs, which would be compiled now
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(torch.distributed.get_backend(), verbose=False)


def wants_fsdp() -> bool:
    """Whether accelerate's config asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _word(key: str, value: Any) -> Any:
    """YAML reads `eval_strategy: no` as false."""
    return "no" if key.endswith("_strategy") and value is False else value


def _name(key: str, known: set[str]) -> str:
    """The name that the installed Transformers prefers."""
    new = _OLD_NAMES.get(key, key)
    return new if new in known else key


def checkpointing(arguments: TrainingArguments) -> bool:
    """Whether layers are computed again in the backward pass."""
    return bool(getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing)
