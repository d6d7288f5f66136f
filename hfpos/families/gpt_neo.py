"""GPT-Neo: a learned table of positions, logits that are not scaled, and every other layer with a window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.models.gpt_neo import modeling_gpt_neo

from hfpos.attention.dense import in_window
from hfpos.families._own_attention import OwnAttention, attend, in_heads
from hfpos.families._tables import RowsInPlace, resized_table, switched_off
from hfpos.plan import Hook, Swap, set_attribute
from hfpos.schemes.learned import Learned


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.call import Call
    from hfpos.plan import Edit
    from hfpos.positions import PositionHook


class GPTNeoAttention(modeling_gpt_neo.GPTNeoSelfAttention):
    """GPT-Neo's attention on Transformers' attention interface. Its layers hand on no keyword arguments, so the `Call` comes with the mask."""

    @property
    def layer_idx(self) -> int:
        """Which layer it is of."""
        return self.layer_id

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: tuple[Call, torch.Tensor | None],
        layer_past: Any = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, Q, E) -> the attention output (B, Q, E), and the weights, if any."""
        call, mask = attention_mask
        query, key, value = in_heads(hidden_states, (self.q_proj, self.k_proj, self.v_proj), self.head_dim)
        output, weights = attend(
            *(self, query, key, value, mask, call, layer_past, output_attentions),
            window=self.config.window_size if self.attention_type == "local" else None,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=1.0,
        )
        return self.resid_dropout(self.out_proj(output)), weights


class GPTNeoBlock(modeling_gpt_neo.GPTNeoBlock):
    """GPT-Neo's layer; takes the `Call` of the forward under way as an argument, so that gradient checkpointing keeps it."""

    hfpos_source: PositionHook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Put the `Call` beside the mask."""
        return super().__call__(
            *args, **kwargs | {"attention_mask": (self.hfpos_source.call, kwargs["attention_mask"])}
        )


class GPTNeo(OwnAttention):
    """GPT-Neo and its heads."""

    name = "gpt_neo"
    trained_kind = Learned
    hook_options = {"passes_call": False}  # noqa: RUF012
    layer_class = GPTNeoBlock
    attention_class = GPTNeoAttention
    resized: Any = None

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        return None if isinstance(model.base_model, modeling_gpt_neo.GPTNeoModel) else "it is not a GPT-Neo"

    def native(self) -> str:
        return "learned"

    def attention_of(self, layer: Any) -> Any:
        return layer.attn.attention

    def probe_positions(self, geometry: Any) -> None:
        return None

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        return [*switched_off(self.decoder.wpe), *super().positions_off(config)]

    def resize_edits(self, scheme: Any, config: PreTrainedConfig) -> list[Edit]:
        table = self.decoder.wpe
        self.resized = resized_table(table, scheme)
        edits: list[Edit] = [Swap(self.decoder, "wpe", table, self.resized)]
        length = self.resized.num_embeddings
        for attention in map(self.attention_of, self.layers()):
            width = attention.config.window_size if attention.attention_type == "local" else length
            mask = in_window(None, length, attention.bias.new_empty(1, 1, length, 0), length, width)
            edits.append(set_attribute(attention, "bias", mask))  # which stock attention keeps
        return edits

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        if self.resized is None:
            return super().layer_edits(hook)
        return [Hook(self.resized, "register_forward_hook", RowsInPlace(hook))]
