"""What a scheme should give, worked out on the unpatched model without any of hfpos's own attention code."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from hfpos.bench.probes import logits
from hfpos.evaluate.attention_profile import attention_by
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


def rotary_tables(model: PreTrainedModel) -> list[Any]:
    """The modules that rotate by a table of their own: for each position sin of all frequencies, then cos."""
    return [module for module in model.modules() if isinstance(getattr(module, "embed_positions", None), torch.Tensor)]


def nope_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of `model` with the output of its rotary modules replaced by the identity; None where it has none."""
    if not rotary_modules(model) and not rotary_tables(model):
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
    with ExitStack() as undo:
        undo.enter_context(_rotation_off(model))
        # Not under a name of its own: some models do more in their layers for the names they know.
        undo.enter_context(attention_by(model, "eager"))
        for family in {sys.modules[type(module).__module__] for module in model.modules()}:
            if eager := getattr(family, "eager_attention_forward", None):
                undo.callback(setattr, family, "eager_attention_forward", eager)
                family.__dict__["eager_attention_forward"] = with_bias(eager)
        found = logits(model, ids, use_cache=False)
    return found if called else None


@contextmanager
def _rotation_off(model: PreTrainedModel) -> Iterator[None]:
    with ExitStack() as undo:
        for module in rotary_modules(model):
            undo.callback(module.register_forward_hook(_identity).remove)
        for module in rotary_tables(model):
            table = module.embed_positions
            undo.callback(setattr, module, "embed_positions", table)
            half = table.shape[1] // 2
            module.embed_positions = torch.cat(
                (torch.zeros_like(table[:, :half]), torch.ones_like(table[:, half:])), 1
            )
        yield


def _identity(module: nn.Module, arguments: tuple, output: Any) -> Any:
    if isinstance(output, tuple):
        return torch.ones_like(output[0]), torch.zeros_like(output[1])
    return torch.ones_like(output) if output.is_complex() else output
