"""Phi-3.5-MoE: its rotary module computes its frequencies anew from the config in every call, and scales them by a rule of its own.

Patched, cos and sin go by the frequencies that were put in. So its own scaling (`longrope` with `short_mscale` and `long_mscale`) is
only there unpatched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.models.phimoe import modeling_phimoe

from hfpos.families._rotary import RotaryDecoder
from hfpos.rotation import cos_sin


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class PhimoeRotary(modeling_phimoe.PhimoeRotaryEmbedding):
    """Phi-MoE's rotary module, by the frequencies that it holds."""

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (B, Q, D) of `position_ids` (B, Q), in the dtype of `x`."""
        cos, sin = cos_sin(position_ids, self.inv_freq.to(x.device), self.attention_scaling)
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((sin, sin), dim=-1).to(x.dtype)


class Phimoe(RotaryDecoder):
    """Phi-3.5-MoE and its heads."""

    name = "phimoe"
    priority = 1

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        own = isinstance(model.base_model, modeling_phimoe.PhimoeModel)
        return super().refuses(model) if own else "it is not a Phi-MoE"

    def build(self, config: PreTrainedConfig) -> Any:
        rotary = super().build(config)
        rotary.__class__ = PhimoeRotary
        return rotary
