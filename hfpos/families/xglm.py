"""XGLM: a table of sinusoids in fairseq's layout, and an attention of its own that knows no other implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.models.xglm import modeling_xglm

from hfpos.families._own_attention import OwnAttention, attend, in_heads
from hfpos.plan import swap_class
from hfpos.schemes.sinusoidal import Sinusoidal


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.call import Call
    from hfpos.plan import Edit
    from hfpos.positions import PositionHook


class NoSinusoids(modeling_xglm.XGLMSinusoidalPositionalEmbedding):
    """XGLM's table, adding nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A zero without dimensions: it broadcasts."""
        return torch.zeros(())


class XGLMAttention(modeling_xglm.XGLMAttention):
    """XGLM's self-attention on Transformers' attention interface."""

    config: PreTrainedConfig
    is_causal = True

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        hfpos: Call,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, Q, E) -> the attention output (B, Q, E), and the weights, if any."""
        query, key, value = in_heads(hidden_states, (self.q_proj, self.k_proj, self.v_proj), self.head_dim)
        wanted = kwargs.get("output_attentions")
        output_attentions = self.config.output_attentions if wanted is None else wanted
        options: dict[str, Any] = {"dropout": self.dropout if self.training else 0.0, "scaling": self.scaling}
        output, weights = attend(
            self, query, key, value, attention_mask, hfpos, past_key_values, output_attentions, **options
        )
        return self.out_proj(output), weights


class XGLMDecoderLayer(modeling_xglm.XGLMDecoderLayer):
    """XGLM's layer; takes the `Call` of the forward under way as an argument, so that gradient checkpointing keeps it, and hands it on."""

    hfpos_source: PositionHook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Add the `Call`."""
        return super().__call__(*args, **kwargs | {"hfpos": self.hfpos_source.call})


class XGLM(OwnAttention):
    """XGLM and its heads."""

    name = "xglm"
    trained_kind = Sinusoidal
    layer_class = XGLMDecoderLayer
    attention_name = "self_attn"
    attention_class = XGLMAttention

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        decoder = model.base_model
        if not isinstance(decoder, modeling_xglm.XGLMModel):
            return "it is not an XGLM"
        return "it attends to another text too (add_cross_attention)" if decoder.config.add_cross_attention else None

    def native(self) -> str:
        return "sinusoidal"

    def layers(self) -> Any:
        return self.decoder.layers

    def stateful_modules(self) -> list[nn.Module]:
        return [self.decoder.embed_positions]

    def lengthen_tables(self, length: int) -> None:
        table = self.decoder.embed_positions
        table.make_weights(length + table.offset, table.embedding_dim, table.padding_idx)

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        return [swap_class(self.decoder.embed_positions, NoSinusoids), *super().positions_off(config)]
