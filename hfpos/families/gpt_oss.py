"""gpt-oss and AFMoE: their mask code does not look at position ids, so that documents packed into a row would see each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.models.afmoe.modeling_afmoe import AfmoeModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssModel

from hfpos.families._rotary import RotaryDecoder


if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GptOss(RotaryDecoder):
    """gpt-oss, AFMoE and their heads; patched, they keep packed documents apart."""

    name = "gpt_oss"
    priority = 1
    hook_options = {"masks_packing": True}  # noqa: RUF012

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        own = isinstance(model.base_model, (GptOssModel, AfmoeModel))
        return super().refuses(model) if own else "it is neither a gpt-oss nor an AFMoE"
