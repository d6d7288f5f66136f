"""What is said before step 0: the model, the engine, tokens and memory."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hfpos.probe import can_run
from hfpos.scheme import PatchError
from hfpos.train.memory import estimate, size
from hfpos.train.parallel import layout_of
from hfpos.train.planning import memory_settings, skeleton


if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from hfpos.train.numbers import Numbers
    from hfpos.train.recipe import Recipe


def memory_estimate(recipe: Recipe, model: Any, accelerator: Any) -> dict[str, Any] | str:
    """What `hfpos plan` says of this run, or why it cannot say anything."""
    if not can_run(model):
        return "not estimated, as its weights lie in shards already; `hfpos plan` does it without them"
    settings = memory_settings(recipe) | {"layout": layout_of(accelerator), "device": accelerator.device.type}
    if settings["mixed_precision"] == "no":
        settings["mixed_precision"] = accelerator.mixed_precision
    try:
        memory = estimate(skeleton(recipe), **settings)
    except PatchError as error:  # some models cannot be gone through without content, and are trained all the same
        return f"not estimated ({error})"
    return {"needed": memory.needed, **dataclasses.asdict(memory)}


def announce(
    console: Console,
    recipe: Recipe,
    model: Any,
    figures: Numbers,
    results: dict[str, Any],
    checkpoint: Path | None,
) -> None:
    """Say what is about to happen, before step 0."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    console.print(
        f"model: {recipe.model.path or recipe.model.config}, {model.num_parameters():,} parameters, {trained:,} of them trained"
    )
    console.print(f"scheme: {recipe.create_scheme() or 'none, its own positions'}")
    console.print(f"engine: {results['engine']}; loss: {results['loss']}")
    for line in figures.lines():
        console.print(line)
    memory = results["memory"]
    console.print(
        f"memory of a process: {size(memory['needed']) + ' estimated' if isinstance(memory, dict) else memory}"
    )
    if checkpoint is not None:
        console.print(f"going on from {checkpoint}")
