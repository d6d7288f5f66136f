"""BLOOM: ALiBi by the paper's slopes, in a model that is then fast in the rest too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.models.bloom import modeling_bloom

from hfpos.families._own_attention import OwnAlibi, attend, no_bias
from hfpos.plan import set_attribute, swap_class
from hfpos.positions import PositionHook
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.call import Call
    from hfpos.plan import Edit


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
        kwargs |= {
            "dropout": self.attention_dropout.p if self.training else 0.0,
            "scaling": self.inv_norm_factor,
        }
        output, weights = attend(
            self, query, key, value, attention_mask, alibi, layer_past, output_attentions, **kwargs
        )
        return modeling_bloom.dropout_add(self.dense(output), residual, self.hidden_dropout, self.training), weights


class BloomBlock(modeling_bloom.BloomBlock):
    """BLOOM's layer; takes the `Call` of the forward under way as an argument, so that gradient checkpointing keeps it."""

    hfpos_source: PositionHook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Put the `Call` in the place of BLOOM's own bias."""
        return super().__call__(*args, **kwargs | {"alibi": self.hfpos_source.call})


class BloomGelu(modeling_bloom.BloomGelu):
    """BLOOM's GELU in one pass over memory instead of nine: with fast attention, a quarter of a forward's time goes there."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x ** 3)))`, as BLOOM has it."""
        return torch.nn.functional.gelu(x, approximate="tanh")


class Bloom(OwnAlibi):
    """BLOOM and its heads."""

    name = "bloom"
    length_key = "seq_length"
    layer_class = BloomBlock
    attention_name = "self_attention"
    attention_class = BloomAttention
    writes_mask = False

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        return None if isinstance(model.base_model, modeling_bloom.BloomModel) else "it is not a BLOOM"

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        if self.config.pretraining_tp > 1 and self.config.slow_but_exact:
            raise PatchError(
                "BLOOM with slow_but_exact=True sums its projections in slices; load it with slow_but_exact=False"
            )
        faster = [swap_class(block.mlp.gelu_impl, BloomGelu) for block in self.decoder.h]
        return [
            set_attribute(self.decoder, "build_alibi_tensor", no_bias),
            *faster,
            *super().positions_off(config),
        ]
