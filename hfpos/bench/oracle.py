"""What a scheme should give, worked out on the unpatched model without any of hfpos's own attention code."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from hfpos.bench.probes import logits
from hfpos.schemes.alibi import alibi_slopes


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn
    from transformers import PreTrainedModel


def rotary_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that work out cos and sin for the attention layers, wherever they are."""
    return [
        module
        for module in model.modules()
        if "rotary" in type(module).__name__.lower()
        or any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    ]


def nope_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of `model` with the output of its rotary modules replaced by the identity; None where it has none."""
    if not rotary_modules(model):
        return None
    with _rotation_off(model):
        return logits(model, ids, use_cache=False)


def alibi_logits(model: PreTrainedModel, ids: torch.Tensor, factor: float) -> torch.Tensor | None:
    """The same with a dense ALiBi bias in its own eager attention; None where its attention has no function to add it in."""
    called: list[nn.Module] = []

    def with_bias(eager: Callable[..., Any]) -> Callable[..., Any]:
        def attention(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            called.append(module)
            slopes = torch.tensor(alibi_slopes(query.shape[1])) / factor
            positions = torch.arange(key.shape[2])
            bias = -slopes[:, None, None] * (positions[-query.shape[2] :, None] - positions)
            mask = bias if attention_mask is None else attention_mask + bias
            return eager(module, query, key, value, mask, *args, **kwargs)

        return attention

    if not rotary_modules(model):
        return None
    backends = _backends(model)
    with ExitStack() as undo:
        undo.enter_context(_rotation_off(model))
        undo.callback(_set_backends, backends)
        # Not under a name of its own: some models do more in their layers for the names they know.
        _set_backends([(config, "eager") for config, _ in backends])
        for family in {sys.modules[type(module).__module__] for module in model.modules()}:
            if eager := getattr(family, "eager_attention_forward", None):
                undo.callback(setattr, family, "eager_attention_forward", eager)
                family.__dict__["eager_attention_forward"] = with_bias(eager)
        found = logits(model, ids, use_cache=False)
    return found if called else None


@contextmanager
def _rotation_off(model: PreTrainedModel) -> Iterator[None]:
    handles = [module.register_forward_hook(_identity) for module in rotary_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _identity(module: nn.Module, arguments: tuple, output: Any) -> Any:
    if isinstance(output, tuple):
        return torch.ones_like(output[0]), torch.zeros_like(output[1])
    return torch.ones_like(output) if output.is_complex() else output


def _backends(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str]]:
    """Every config in the model with its attention implementation, outer ones first, as they set those inside them too."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    return [
        (config, config._attn_implementation) for config in configs.values() if isinstance(config, PreTrainedConfig)
    ]


def _set_backends(backends: list[tuple[PreTrainedConfig, str]]) -> None:
    for config, name in backends:
        config._attn_implementation = name
