"""CodeGen: GPT-J with one projection for queries, values and keys, in four blocks that are left from where it was trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.models.codegen import modeling_codegen

from hfpos.families._own_attention import CallAsPositionIds
from hfpos.families.gptj import GPTJ, GPTJAttention


if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCKS = 4  # one of each TPU core


class CodeGenAttention(modeling_codegen.CodeGenAttention):
    """CodeGen's attention on Transformers' attention interface, as GPT-J's is."""

    forward = GPTJAttention.forward  # type: ignore[assignment]

    def split(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        """hidden_states (B, Q, E) -> query, key and value, each (B, H, Q, D), unrotated."""
        mixed = self.qkv_proj(hidden_states)
        mixed = mixed.view(*mixed.shape[:2], BLOCKS, 3, self.num_attention_heads // BLOCKS, self.head_dim)
        query, value, key = mixed.unbind(3)
        return (part.flatten(2, 3).transpose(1, 2) for part in (query, key, value))


class CodeGenBlock(CallAsPositionIds, modeling_codegen.CodeGenBlock):
    """CodeGen's layer, which hands the `Call` to its attention."""


class CodeGen(GPTJ):
    """CodeGen."""

    name = "codegen"
    layer_class = CodeGenBlock
    attention_class = CodeGenAttention
    decoder_class = modeling_codegen.CodeGenModel
