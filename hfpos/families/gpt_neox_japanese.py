"""GPT-NeoX-Japanese: its attention knows no other implementation than its own, and moves to Transformers' interface to take a bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.models.gpt_neox_japanese import modeling_gpt_neox_japanese as modeling

from hfpos.families._own_attention import CallAsPositionIds, attend
from hfpos.families._own_attention_rotary import OwnAttentionRotary


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfpos.call import Call


class JapaneseAttention(modeling.GPTNeoXJapaneseAttention):
    """Its attention on Transformers' attention interface. Its layers hand on no keyword arguments, so the `Call` comes as `position_ids`."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: Call,
        layer_past: Any = None,
        output_attentions: bool = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """hidden_states (B, Q, E) -> the attention output (B, Q, E), the weights, if any, and the bias of the last layer."""
        heads = (*hidden_states.shape[:2], self.num_attention_heads, 3 * self.head_size)
        query, key, value = self.query_key_value(hidden_states).view(heads).transpose(1, 2).chunk(3, dim=-1)
        turned = modeling.apply_rotary_pos_emb(
            query[..., : self.rotary_ndims], key[..., : self.rotary_ndims], *position_embeddings
        )
        query, key = (
            torch.cat((front, whole[..., self.rotary_ndims :]), dim=-1)
            for front, whole in zip(turned, (query, key), strict=True)
        )
        options: dict[str, Any] = {
            "dropout": self.attention_dropout.p if self.training else 0.0,
            "scaling": 1 / self.norm_factor,
        }
        output, weights = attend(
            self, query, key, value, attention_mask, position_ids, layer_past, output_attentions, **options
        )
        return self.dense(output), weights, self.dense_bias


class JapaneseLayer(CallAsPositionIds, modeling.GPTNeoXJapaneseLayer):
    """Its layer, which hands the `Call` to its attention."""


class GPTNeoXJapanese(OwnAttentionRotary):
    """GPT-NeoX-Japanese and its heads."""

    name = "gpt_neox_japanese"
    layer_class = JapaneseLayer
    attention_name = "attention"
    attention_class = JapaneseAttention

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        own = isinstance(model.base_model, modeling.GPTNeoXJapaneseModel)
        return super().refuses(model) if own else "it is not a GPT-NeoX-Japanese"
