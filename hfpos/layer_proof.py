"""Shows that a scheme of its own in single layers reaches each of them: some models do not rotate in every layer."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from hfpos.attention.learned import LEARNED
from hfpos.families._rotary_tables import LayerTable, Twice


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn


def idle_layers(decoder: nn.Module, layers: Iterable[int], run: Callable[[], Any]) -> list[int]:
    """Those of `layers` whose attention gives what it gives with the model's own positions, whatever the scheme has learned.

    Args:
        decoder: of a patched model, whose attention modules know their `layer_idx`.
        layers: which to watch.
        run: runs the model once, without a cache.
    """
    wanted = set(layers)
    watches: dict[int, Twice] = {}
    handles: list[Any] = []
    try:
        for module in decoder.modules():
            index = getattr(module, "layer_idx", None)
            takes_table = any(isinstance(hook, LayerTable) for hook in module._forward_pre_hooks.values())
            if index in wanted and takes_table and index not in watches:
                watch = watches[index] = Twice(LayerTable(0))
                handles.append(module.register_forward_pre_hook(watch.before, with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(watch.after))
        with _as_if_trained(decoder):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return sorted(index for index in wanted if index not in watches or watches[index].same)


@contextlib.contextmanager
def _as_if_trained(decoder: nn.Module) -> Iterator[None]:
    """Other values in what the scheme learns, for a while: zeros, from which some start, show nothing in a layer without positions."""
    learned = getattr(decoder, LEARNED, None)
    weights = [] if learned is None else list(learned.parameters())
    kept = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.linspace(0, 1, weight.numel()).view_as(weight).to(weight.device))
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
