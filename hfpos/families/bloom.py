"""BLOOM: ALiBi, in an attention of its own that knows no other implementation; here it moves to Transformers' interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bloom import modeling_bloom

from hfpos.attention.dense import eager_attention
from hfpos.attention.interface import PREFIX
from hfpos.families._family import Family
from hfpos.families.gpt2 import DEFAULT_THETA, PositionTables
from hfpos.plan import Hook, set_attribute, swap_class
from hfpos.positions import OuterPositionIds, PositionHook
from hfpos.rotation import rotate
from hfpos.scheme import Geometry, PatchError, Rope, Scheme
from hfpos.schemes.alibi import Alibi, alibi_slopes


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.plan import Edit
    from hfpos.positions import Call


class BloomAttention(modeling_bloom.BloomAttention):
    """BLOOM's attention on Transformers' attention interface. Its layers hand on only `alibi`, so the `Call` comes as that."""

    config: PreTrainedConfig

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: Call,
        attention_mask: torch.Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states, residual (B, Q, E) -> the sum of residual and attention output (B, Q, E), and the weights, if any."""
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if alibi.rotation is not None:
            cos, sin = (part.to(query.device) for part in alibi.rotation)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        backend = self.config._attn_implementation
        prefix = PREFIX if backend.startswith(PREFIX) else ""
        if prefix:
            kwargs["hfpos"] = alibi
        if output_attentions:  # which BLOOM always could, and which there is no way to ask another implementation for
            backend = f"{prefix}eager"
        dropout = self.attention_dropout.p if self.training else 0.0
        output, weights = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention)(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.inv_norm_factor, **kwargs
        )
        output = self.dense(output.flatten(-2))
        return modeling_bloom.dropout_add(output, residual, self.hidden_dropout, self.training), weights


class BloomBlock(modeling_bloom.BloomBlock):
    """BLOOM's layer; takes the `Call` of the forward under way as an argument, so that gradient checkpointing keeps it."""

    hfpos_source: PositionHook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Put the `Call` in the place of BLOOM's own bias."""
        return super().__call__(*args, **kwargs | {"alibi": self.hfpos_source.call})


def no_alibi(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> None:
    """Stands in for BLOOM's own bias, which is not used and would not take a 4-D mask."""


class Bloom(Family):
    """BLOOM and its heads."""

    name = "bloom"
    trained_kind = Alibi
    hook_options = {"passes_call": False, "masks_packing": True}  # noqa: RUF012

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        return None if isinstance(model.base_model, modeling_bloom.BloomModel) else "it is not a BLOOM"

    def native(self) -> str:
        return "alibi"

    def geometry(self) -> Geometry:
        head_dim = self.config.hidden_size // self.config.n_head
        return Geometry(
            heads=self.config.n_head,
            head_dim=head_dim,
            rotary_dim=head_dim,
            theta=DEFAULT_THETA,
            trained_length=getattr(self.config, "seq_length", None),
            allowed_length=None,
        )

    def length_keys(self) -> tuple[str, ...]:
        return ("seq_length",)

    def reaches_attention(self) -> bool:
        return True  # once it is patched

    def backend(self) -> str | None:
        stock = super().backend()
        return "sdpa" if stock == "eager" else stock  # eager is all that the stock model has; here it need not be

    def probe_positions(self, geometry: Geometry) -> None:
        return None

    def is_unchanged(self, scheme: Scheme, geometry: Geometry) -> bool:
        return isinstance(scheme, Alibi) and scheme.head_slopes(geometry.heads) == alibi_slopes(geometry.heads)

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        if self.config.pretraining_tp > 1 and self.config.slow_but_exact:
            raise PatchError(
                "BLOOM with slow_but_exact=True sums its projections in slices; load it with slow_but_exact=False"
            )
        config._attn_implementation = self.backend()
        edits: list[Edit] = [set_attribute(self.decoder, "build_alibi_tensor", no_alibi)]
        for block in self.decoder.h:
            edits += [
                swap_class(block, BloomBlock),
                swap_class(block.self_attention, BloomAttention),
                set_attribute(block.self_attention, "config", config),
            ]
        return edits

    def rotary_edits(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> tuple[list[Edit], bool, dict]:
        return self.positions_off(config), False, {"rotation": PositionTables(scheme, geometry)}

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        edits: list[Edit] = [set_attribute(block, "hfpos_source", hook) for block in self.decoder.h]
        if self.model is not self.decoder:
            edits.append(Hook(self.model, "register_forward_pre_hook", OuterPositionIds(hook), {"with_kwargs": True}))
        return edits
