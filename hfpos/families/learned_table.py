"""Decoders that add a table of positions to the token embeddings: OPT, BioGPT, GPT-BigCode and the decoders of the BART kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from hfpos.attention.fixed_rotary import FixedRotation
from hfpos.families._family import Family
from hfpos.families._tables import RowsInPlace, offset_of, resized_table, switched_off
from hfpos.families._without_rotary import geometry_without_rotary
from hfpos.plan import Hook, Swap
from hfpos.scheme import Geometry, PatchError, Rope
from hfpos.schemes.learned import Learned


if TYPE_CHECKING:
    from hfpos.plan import Edit
    from hfpos.positions import PositionHook

TABLE_NAMES = ("wpe", "embed_positions")
LENGTH_KEYS = ("max_position_embeddings", "max_target_positions")


def tables(model: Any) -> list[tuple[Any, str]]:
    """`(owner, name)` of every table of positions in the language model of `model`."""
    config = model.config.get_text_config(decoder=True)
    return [
        (owner, name)
        for owner in model.modules()
        if getattr(owner, "config", None) is config
        for name, child in owner.named_children()
        if name in TABLE_NAMES and isinstance(child, nn.Embedding)
    ]


class LearnedTable(Family):
    """A decoder with a table of positions, learned or sinusoidal."""

    name = "learned_table"
    priority = 0
    trained_kind = Learned
    hook_options = {"masks_packing": True}  # noqa: RUF012
    outside_attention = "sinusoidal, learned or nope"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        ((self.owner, self.table_name),) = tables(model)
        self.table: Any = getattr(self.owner, self.table_name)
        self.resized: Any = None

    @classmethod
    def find_decoder(cls, model: PreTrainedModel) -> Any:
        return tables(model)[0][0]

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        found = tables(model)
        if not found:
            return f"it has no table of positions (a module named {' or '.join(TABLE_NAMES)})"
        owner = found[0][0]
        if len(found) > 1 or not isinstance(owner, PreTrainedModel) or owner.config.is_encoder_decoder:
            return f"it adds positions in {len(found)} places (in {type(owner).__name__} ...), not once in one decoder"
        return None

    def native(self) -> str:
        return "sinusoidal" if "Sinusoidal" in type(self.table).__name__ else "learned"

    def geometry(self) -> Geometry:
        rows = self.table.num_embeddings - offset_of(self.table)
        return geometry_without_rotary(self.config.num_attention_heads, self.config.hidden_size, rows)

    def length_keys(self) -> tuple[str, ...]:
        rows = self.geometry().trained_length
        return tuple(key for key in LENGTH_KEYS if getattr(self.config, key, None) == rows)

    def probe_positions(self, geometry: Geometry) -> None:
        return None

    def positions_off(self, config: Any) -> list[Edit]:
        return switched_off(self.table)

    def rotary_edits(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> tuple[list[Edit], bool, dict]:
        if not self.reaches_attention():
            raise PatchError(
                f"{scheme.name!r} rotates queries and keys, and {type(self.model).__name__} does not use Transformers' attention interface; use "
                f"{self.outside_attention}"
            )
        return self.positions_off(config), False, {"seam": FixedRotation(*scheme.frequencies(geometry))}

    def resize_edits(self, scheme: Any, config: Any) -> list[Edit]:
        self.resized = resized_table(self.table, scheme)
        return [Swap(self.owner, self.table_name, self.table, self.resized)]

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        return [] if self.resized is None else [Hook(self.resized, "register_forward_hook", RowsInPlace(hook))]
