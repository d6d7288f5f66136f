"""Embeddings that look positions and token types up in buffers of their own."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from torch import nn

    from hfpos.positions import PositionHook


class Places:
    """Forward pre-hook of the embeddings: tells them where tokens stand, as their own buffers end where the trained table does."""

    def __init__(self, source: PositionHook, embeddings: nn.Module) -> None:
        self.source = source
        self.arguments = [name for name in inspect.signature(type(embeddings).forward).parameters if name != "self"]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Put in the position ids, and the token types that the model would take from a buffer."""
        if self.source.positions is None:
            return None
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        tokens = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"][..., 0] if tokens is None else tokens
        places = self.source.positions.to(tokens.device) + self.source.first
        kwargs["position_ids"] = places.expand(tokens.shape[0], -1)
        if "token_type_ids" in self.arguments and kwargs.get("token_type_ids") is None:
            kwargs["token_type_ids"] = torch.zeros_like(tokens, dtype=torch.int64)
        return (), kwargs
