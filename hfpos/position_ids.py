"""Position ids: from masks, and on their way to the modules that take them."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from torch import nn

    from hfpos.positions import PositionHook


class TruePositions:
    """Forward pre-hook of a rotary embedding or position table: puts the true ids in the place of the closed-up ones."""

    def __init__(self, source: PositionHook, argument: int) -> None:
        self.source = source
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Replace `position_ids` where the hook of this call has closed gaps up."""
        true = self.source.true_ids
        if true is None:
            return None
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": true.to(kwargs["position_ids"].device)}
        given = args[self.argument]
        return (*args[: self.argument], true.to(given.device), *args[self.argument + 1 :]), kwargs


class OuterPositionIds:
    """Forward pre-hook of a language model whose head does not hand `position_ids` on to its decoder (BLOOM)."""

    def __init__(self, target: PositionHook) -> None:
        self.target = target

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Keep the caller's ids for the decoder's own hook."""
        self.target.outer_ids = kwargs.pop("position_ids", None)
        return args, kwargs


class MaskedPositionIds:
    """Forward pre-hook of a composite model, which would count positions itself, padding included, before its decoder is asked."""

    def __init__(self, model: nn.Module) -> None:
        self.arguments = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Put in the position ids that follow from a 2-D attention mask, unless the caller gave some."""
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        wanted = "position_ids" in self.arguments and kwargs.get("position_ids") is None
        if wanted and tokens is not None and isinstance(mask, torch.Tensor) and mask.ndim == 2:
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()
            kwargs["position_ids"] = masked_positions(mask, past, tokens.shape[1])
        return (), kwargs


def masked_positions(mask: torch.Tensor, past: int | torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions (B, tokens) of the tokens after the first `past` under a mask (B, >= past + tokens) that is 0 where there is padding."""
    if isinstance(past, int) and mask.shape[-1] < past + tokens:
        raise PatchError(
            f"the attention_mask covers {mask.shape[-1]} tokens; expected one entry for each of the {past} tokens in the cache and the "
            f"{tokens} of this call"
        )
    index = torch.arange(tokens, device=mask.device) + past
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, index]


def refuse_hidden(mask: Any, past: int | torch.Tensor) -> None:
    """Raise `PatchError` where a 4-D mask hides earlier tokens, so that counting would not tell where the others stand."""
    if (
        not isinstance(mask, torch.Tensor)
        or mask.ndim != 4
        or torch.compiler.is_compiling()
        or not isinstance(past, int)
    ):
        return
    visible = mask if mask.dtype == torch.bool else mask == 0
    if not bool(visible.tril(past).eq(torch.ones_like(visible).tril(past)).all()):
        raise PatchError(
            "the 4-D attention_mask hides earlier tokens (padding, or documents packed into a row) and no position_ids came with it, so "
            "where the others stand cannot be told; pass position_ids, or a 2-D attention_mask"
        )
