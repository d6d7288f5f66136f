"""GPT-2: a learned table of positions, added to the token embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2 import modeling_gpt2

from hfpos.families._family import Family
from hfpos.families._tables import resized_table, switched_off
from hfpos.families._without_rotary import PositionTables, geometry_without_rotary
from hfpos.plan import Hook, Swap, swap_class
from hfpos.position_ids import TruePositions
from hfpos.positions import PositionHook
from hfpos.rotation import rotate
from hfpos.scheme import Geometry, PatchError, Rope
from hfpos.schemes.learned import Learned


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.call import Call
    from hfpos.plan import Edit


class GPT2Attention(modeling_gpt2.GPT2Attention):
    """GPT-2's self-attention with queries and keys rotated before they are cached."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        hfpos: Call | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, Q, E) -> the attention output (B, Q, E) and the weights, if the implementation gives them."""
        if hfpos is None or hfpos.rotation is None:
            raise PatchError("this layer was called outside its model and has no positions; call the model")
        heads = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (
            x.view(heads).transpose(1, 2) for x in self.c_attn(hidden_states).split(self.split_size, dim=2)
        )
        cos, sin = (part.to(query.device) for part in hfpos.rotation)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if past_key_values is not None:
            cache = past_key_values
            cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_gpt2.eager_attention_forward
        )
        dropout = self.attn_dropout.p if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.resid_dropout(self.c_proj(output.flatten(-2).contiguous())), weights


class GPT2(Family):
    """GPT-2 and its heads."""

    name = "gpt2"
    trained_kind = Learned

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        return None if isinstance(model.base_model, modeling_gpt2.GPT2Model) else "it is not a GPT-2"

    def native(self) -> str:
        return "learned"

    def geometry(self) -> Geometry:
        return geometry_without_rotary(self.config.n_head, self.config.n_embd, self.config.n_positions)

    def length_keys(self) -> tuple[str, ...]:
        return "n_positions", "n_ctx"

    def probe_positions(self, geometry: Geometry) -> list[int]:
        last = self.decoder.wpe.weight.shape[0] - 1
        return [last * i // 7 for i in range(8)]

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        return switched_off(self.decoder.wpe)

    def rotary_edits(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> tuple[list[Edit], bool, dict]:
        edits = self.positions_off(config)
        for block in self.decoder.h:
            if block.attn.reorder_and_upcast_attn:
                raise PatchError(
                    "GPT-2 with reorder_and_upcast_attn=True computes attention in its own way; load it with False"
                )
            edits.append(swap_class(block.attn, GPT2Attention))
        return edits, False, {"rotation": PositionTables(scheme, geometry)}

    def resize_edits(self, scheme: Any, config: PreTrainedConfig) -> list[Edit]:
        table = self.decoder.wpe
        self.resized = resized = resized_table(table, scheme)
        return [Swap(self.decoder, "wpe", table, resized)]

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        table = getattr(self, "resized", None)
        if table is None:
            return []
        return [Hook(table, "register_forward_pre_hook", TruePositions(hook, 0), {"with_kwargs": True})]
