"""GPT-J: neighbouring dimensions are rotated, by a table in each attention that ends at the trained length. Patched, any length goes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.models.gptj import modeling_gptj

from hfpos.attention.fixed_rotary import FixedRotation
from hfpos.families._own_attention import CallAsPositionIds, OwnAttention, attend, in_heads
from hfpos.scheme import Geometry, Rope
from hfpos.schemes.rope import Rotary


if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel

    from hfpos.attention.seam import Seam
    from hfpos.call import Call

CONVENTION = "interleaved"


class GPTJAttention(modeling_gptj.GPTJAttention):
    """GPT-J's attention on Transformers' attention interface. Its layers hand on no keyword arguments, so the `Call` comes as `position_ids`."""

    def split(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        """hidden_states (B, Q, E) -> query, key and value, each (B, H, Q, D), unrotated."""
        return in_heads(hidden_states, (self.q_proj, self.k_proj, self.v_proj), self.head_dim)

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_ids: Call,
        layer_past: Any = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, Q, E) -> the attention output (B, Q, E), and the weights, if any."""
        query, key, value = self.split(hidden_states)
        output, weights = attend(
            *(self, query, key, value, attention_mask, position_ids, layer_past, output_attentions, CONVENTION),
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=1 / self.scale_attn,
        )
        return self.resid_dropout(self.out_proj(output)), weights


class GPTJBlock(CallAsPositionIds, modeling_gptj.GPTJBlock):
    """GPT-J's layer, which hands the `Call` to its attention."""


class GPTJ(OwnAttention):
    """GPT-J and its heads."""

    name = "gptj"
    trained_kind = Rope
    hook_options = {"passes_call": False}  # noqa: RUF012
    layer_class: ClassVar[type] = GPTJBlock
    attention_class: ClassVar[type] = GPTJAttention
    decoder_class: ClassVar[type] = modeling_gptj.GPTJModel

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        return None if isinstance(model.base_model, cls.decoder_class) else f"it is not a {cls.decoder_class.__name__}"

    def native(self) -> str:
        return "rope"

    def geometry(self) -> Geometry:
        return dataclasses.replace(super().geometry(), rotary_dim=self.config.rotary_dim)

    def is_unchanged(self, scheme: Any, geometry: Geometry) -> bool:
        if scheme.seam != "freq":
            return False
        frequencies, scale = scheme.frequencies(geometry)
        return scale == 1 and torch.equal(frequencies, self.unscaled_frequencies(geometry))

    def score_rotation(self) -> tuple[str, frozenset[int] | None]:
        return CONVENTION, None

    def layer_seam(self, scheme: Any, geometry: Geometry) -> Seam | None:
        if scheme is not None and scheme.seam != "freq":
            return super().layer_seam(scheme, geometry)
        inv_freq, scale = (scheme or Rotary()).frequencies(geometry)
        return FixedRotation(inv_freq, scale, CONVENTION)

    def stateful_modules(self) -> list[nn.Module]:
        return [layer.attn for layer in self.layers()]

    def lengthen_tables(self, length: int) -> None:
        for attention in (layer.attn for layer in self.layers()):
            table = attention.embed_positions
            longer = modeling_gptj.create_sinusoidal_positions(length, attention.pos_embd_dim)
            attention.embed_positions = longer.to(table.device, table.dtype)
