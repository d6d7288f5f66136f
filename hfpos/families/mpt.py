"""MPT: ALiBi with slopes that end at `2 ** -alibi_bias_max`.

Stock knows eager attention only, stops at `max_seq_len` tokens, and takes `alibi_bias_max` for 8 whatever the config says. Patched,
any length goes, with the slopes that the config states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from transformers.models.mpt import modeling_mpt

from hfpos.families._own_attention import OwnAlibi, OwnMask, attend, no_bias
from hfpos.plan import set_attribute


if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

    from hfpos.call import Call
    from hfpos.plan import Edit


class MptAttention(modeling_mpt.MptAttention):
    """MPT's attention on Transformers' attention interface. Its layers hand on only `position_bias`, so all else comes in that."""

    config: PreTrainedConfig

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_bias: tuple[Call, bool],
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, Q, E), and the `Call` and whether the weights are wanted -> the attention output (B, Q, E), and the weights."""
        call, output_attentions = position_bias
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        heads = (*hidden_states.shape[:2], self.n_heads, self.head_dim)
        query, key, value = (x.view(heads).transpose(1, 2) for x in mixed.chunk(3, dim=2))
        drop = self.attn_dropout_p if self.training else 0.0
        options: dict[str, Any] = {"dropout": drop, "scaling": self.softmax_scale}
        output, weights = attend(
            self, query, key, value, attention_mask, call, past_key_values, output_attentions, **options
        )
        return self.out_proj(output), weights


class MptBlock(modeling_mpt.MptBlock):
    """MPT's layer; takes the `Call` and the mask of the forward under way as arguments."""

    hfpos_source: OwnMask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Put the `Call` in the place of MPT's own bias, and the mask in the place of the one written out."""
        bias = (self.hfpos_source.call, kwargs.get("output_attentions", False))
        return super().__call__(*args, **kwargs | {"position_bias": bias, "attention_mask": self.hfpos_source.mask})


def mask_for_generate(
    attention_mask: torch.Tensor | None, past_key_values: Cache, **kwargs: Any
) -> torch.Tensor | None:
    """The 2-D mask, as long as a static cache: `generate` would hand on a 4-D one, which does not say where tokens stand."""
    if attention_mask is None:
        return None
    return pad(attention_mask, (0, past_key_values.get_max_length() - attention_mask.shape[-1]))


class Mpt(OwnAlibi):
    """MPT and its heads."""

    name = "mpt"
    length_key = "max_seq_len"
    layer_class = MptBlock
    attention_name = "attn"
    attention_class = MptAttention

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        if not isinstance(model.base_model, modeling_mpt.MptModel):
            return "it is not an MPT"
        attention: Any = model.base_model.config.attn_config
        if not attention.alibi:
            return "its attn_config says alibi=False, but Transformers has no other positions for an MPT and runs it with ALiBi"
        return None

    def layers(self) -> Any:
        return self.decoder.blocks

    def own_slopes(self) -> list[float]:
        exponent = self.config.attn_config.alibi_bias_max / 8  # the paper's slopes end at 2 ** -8
        return [slope**exponent for slope in super().own_slopes()]

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        return [
            set_attribute(self.decoder, "build_mpt_alibi_tensor", no_bias),
            set_attribute(self.model, "create_masks_for_generate", mask_for_generate),
            *super().positions_off(config),
        ]
