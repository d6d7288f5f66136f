"""Falcon with rotary embeddings (7B, 40B, 180B): its attention knows no bias, and moves to Transformers' interface to take one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.models.falcon import modeling_falcon

from hfpos.families._own_attention_rotary import OwnAttentionRotary
from hfpos.families.falcon import FalconAttention, FalconDecoderLayer


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FalconRotaryAttention(FalconAttention):
    """Falcon's attention on Transformers' attention interface, with the model's own rotation before it."""

    rotates = True


class FalconRotary(OwnAttentionRotary):
    """Falcon with `alibi=False` and its heads."""

    name = "falcon_rotary"
    hook_options = {"masks_packing": True}  # noqa: RUF012
    layer_class = FalconDecoderLayer
    attention_name = "self_attention"
    attention_class = FalconRotaryAttention
    writes_mask = True

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        decoder = model.base_model
        own = isinstance(decoder, modeling_falcon.FalconModel) and not decoder.config.alibi
        return super().refuses(model) if own else "it is not a Falcon with alibi=False"

    def layers(self) -> Any:
        return self.decoder.h
