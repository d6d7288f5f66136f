"""T5 and what is built alike: mT5, UMT5, Switch Transformers; whole, or the encoder alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from hfpos.families._directions import attention_modules
from hfpos.families._stacks import Stack, Stacks
from hfpos.families._without_rotary import geometry_without_rotary
from hfpos.plan import freeze, set_attribute
from hfpos.scheme import Geometry, PatchError, Scheme
from hfpos.schemes.t5 import T5 as T5Scheme


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hfpos.plan import Edit


class NoBias:
    """Stands in for `compute_bias`: one zero, which broadcasts, and which the layers hand on in the place of their bias.

    Args:
        table: the trained table, which is not looked at; the zero is of its dtype.
    """

    def __init__(self, table: Any) -> None:
        self.table = table

    def __call__(self, query_length: int, key_length: int, device: Any = None, **unused: Any) -> torch.Tensor:
        """(1, 1, 1, 1)."""
        return torch.zeros((1, 1, 1, 1), device=device, dtype=self.table.weight.dtype)


class T5Stack(Stack):
    """One stack. Its attention hands a bias of its own to Transformers' attention interface, and scales nothing."""

    trained_kind = T5Scheme

    def native(self) -> str:
        return "t5"

    def geometry(self) -> Geometry:
        heads, width = self.config.num_heads, self.config.d_kv
        return geometry_without_rotary(heads, heads * width, getattr(self.config, "n_positions", None))

    def length_keys(self) -> tuple[str, ...]:
        return ("n_positions",)

    def cross_attention(self) -> list[Any]:
        return [each for each in attention_modules(self.decoder) if not each.is_causal and self.config.is_decoder]

    def tables(self) -> list[Any]:
        """The attention modules with a trained table: the first layer's, in UMT5 all layers'."""
        return [each for each in attention_modules(self.decoder) if each.has_relative_attention_bias]

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        across = self.cross_attention()
        edits: list[Edit] = [
            set_attribute(module, "ignores_position_bias", True)
            for module in attention_modules(self.decoder)
            if module not in across
        ]
        for module in self.tables():
            table = module.relative_attention_bias
            # an optimizer or DDP would trip over a trainable weight that takes no part
            edits += [set_attribute(module, "compute_bias", NoBias(table)), freeze(table)]
        return edits

    def starts_trained(self, scheme: Scheme) -> bool:
        """Whether the model's own table is one that `scheme` can start from."""
        buckets = self.config.relative_attention_num_buckets
        return isinstance(scheme, T5Scheme) and scheme.num_buckets == buckets and len(self.tables()) == 1

    def learned_start(self, scheme: Any, geometry: Geometry) -> dict[str, torch.Tensor]:
        start = super().learned_start(scheme, geometry)
        trained = self.tables()[0].relative_attention_bias.weight
        if not self.starts_trained(scheme) or trained.is_meta:
            return start
        if trained.shape != start["table"].shape:
            raise PatchError(
                f"t5: it starts from the table that {type(self.model).__name__} was trained with, which is in shards here; patch the model "
                "before it is sharded"
            )
        return {"table": trained}

    def is_unchanged(self, scheme: Any, geometry: Geometry) -> bool:
        return self.starts_trained(scheme)  # but for keys farther away than the proof looks, with another max_distance


class T5(Stacks):
    """T5 and its heads."""

    name = "t5"
    trained_kind = T5Scheme

    @classmethod
    def find_stacks(cls, model: PreTrainedModel) -> list[Any]:
        """The modules that run the layers, the encoder first."""
        found = [each for each in model.modules() if isinstance(each, PreTrainedModel) and hasattr(each, "block")]
        return sorted(found, key=lambda stack: stack.config.is_decoder)

    @classmethod
    def find_decoder(cls, model: PreTrainedModel) -> Any:
        return cls.find_stacks(model)[-1]

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        stacks = cls.find_stacks(model)
        biased = [
            (stack, each) for stack in stacks for each in stack.modules() if hasattr(each, "relative_attention_bias")
        ]
        if not biased:
            return "it has no stack with relative_attention_bias"
        other = next((each for stack, each in biased if each not in attention_modules(stack)), None)
        if other is not None:
            return f"its {type(other).__name__} computes attention in its own way, not through Transformers' interface"
        return None

    def stacks(self) -> dict[str, Stack]:
        found = self.find_stacks(self.model)
        return {"decoder" if stack.config.is_decoder else "encoder": T5Stack(stack, self.name) for stack in found}

    def native(self) -> str:
        return "t5"

    def length_keys(self) -> tuple[str, ...]:
        return ("n_positions",)
