"""Falcon with ALiBi (falcon-rw). Falcon without it rotates, and is of the family `falcon_rotary`.

Falcon adds its bias before it scales the logits, so the slopes it was trained with are the paper's over `sqrt(head_dim)`. Stock
rounds slopes and bias to bfloat16 in every dtype, and its eager path (Transformers 5.23) adds the bias twice: with the mask and by
itself. Here it is added once, and not rounded.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers.models.falcon import modeling_falcon

from hfpos.families._own_attention import OwnAlibi, OwnMask, attend
from hfpos.families._rotary_module import RotarySwap, fix
from hfpos.plan import set_attribute


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.call import Call
    from hfpos.plan import Edit


class FalconAttention(modeling_falcon.FalconAttention):
    """Falcon's attention on Transformers' attention interface. Its layers hand on only `alibi`, so the `Call` comes as that."""

    rotates = False

    @property
    def num_key_value_groups(self) -> int:
        """How many heads share a key as it is cached; the new architecture repeats its keys before that."""
        return self.num_heads if self.multi_query and not self.new_decoder_architecture else 1

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        alibi: Call,
        attention_mask: torch.Tensor | None,
        layer_past: Any = None,
        output_attentions: bool = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, Q, E) -> the attention output (B, Q, E), and the weights, if any."""
        query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        if self.rotates:
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        output, weights = attend(
            *(self, query, key, value, attention_mask, alibi, layer_past, output_attentions),
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor,
        )
        return self.dense(output), weights


class FalconDecoderLayer(modeling_falcon.FalconDecoderLayer):
    """Falcon's layer; takes the `Call` and the mask of the forward under way as arguments."""

    hfpos_source: OwnMask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Put the `Call` in the place of Falcon's own bias, and the mask in the place of the one written out."""
        own = {"alibi": self.hfpos_source.call, "attention_mask": self.hfpos_source.mask}
        return super().__call__(*args, **kwargs | own)


class Falcon(OwnAlibi):
    """Falcon with `alibi=True` and its heads."""

    name = "falcon"
    length_key = "max_position_embeddings"
    layer_class = FalconDecoderLayer
    attention_name = "self_attention"
    attention_class = FalconAttention

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        decoder = model.base_model
        own = isinstance(decoder, modeling_falcon.FalconModel) and decoder.config.alibi
        return None if own else "it is not a Falcon with alibi=True"

    def own_slopes(self) -> list[float]:
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return [slope / math.sqrt(head_dim) for slope in super().own_slopes()]

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        return [
            set_attribute(self.decoder, "use_alibi", False),
            self._rotary_still(config),
            *super().positions_off(config),
        ]

    def _rotary_still(self, config: PreTrainedConfig) -> Edit:
        """Falcon has a rotary embedding also where it does not rotate, and runs it; still, it cannot be taken for one in use."""
        rotary = self.decoder.rotary_emb
        with torch.device("cpu"):
            still = type(rotary)(config)
        still = fix(still, {"inv_freq": torch.zeros_like(still.inv_freq)}, {"inv_freq": 1.0})
        return RotarySwap(self.decoder, "rotary_emb", rotary, still, self.config)
