"""Short forwards of a model that leave no trace in it: what the proof of a patch looks at."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from torch import nn

    from hfpos.families._family import Family


def can_run(model: nn.Module) -> bool:
    """Whether a forward would work here and now: weights are there and whole, not on meta and not in shards."""
    if hasattr(model, "hf_device_map"):
        return True
    return not any(
        weight.is_meta or hasattr(weight, "placements") or hasattr(weight, "ds_id") for weight in model.parameters()
    )


@torch.no_grad()
def probe(family: Family, positions: list[int] | None) -> torch.Tensor:
    """The logits (8, vocabulary) of eight tokens, float32, without a trace: modes and remembered lengths are put back.

    Of a model without a language modelling head, the hidden states.
    """
    model: Any = family.model if family.model.get_output_embeddings() is not None else family.model.base_model
    with without_trace(family):
        embedding = model.get_input_embeddings()
        device = embedding.weight.device if not embedding.weight.is_meta else torch.device("cpu")
        words = embedding.weight.shape[0]
        # tokens that differ, as attention moves nothing among equal ones
        ids = torch.arange(8, device=device)[None] * (7 if words > 7 else 1) % words
        given = (
            {}
            if positions is None
            else {"position_ids": torch.tensor([positions], device=device).clamp(max=family.last_position)}
        )
        if "decoder_input_ids" in inspect.signature(type(model).forward).parameters:
            given["decoder_input_ids"] = ids
        if positions is not None:
            family.lengthen_tables(max(positions) + 1)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given)[0][0].float().cpu()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def without_trace(family: Family) -> Iterator[None]:
    """Run the model in eval mode and leave it as it was: its modes, and what its modules remember from call to call."""
    states = [(module, dict(module.__dict__)) for module in family.stateful_modules()]
    with eval_mode(family.model):
        try:
            for module, attributes in states:
                module._buffers = copy.deepcopy(attributes["_buffers"])
            yield
        finally:
            for module, attributes in states:
                module.__dict__.clear()
                module.__dict__.update(attributes)
