"""Decoders that add a table of positions to the token embeddings: OPT, BioGPT, GPT-BigCode and the decoders of the BART kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from hfpos.families._family import Family, calls_interface
from hfpos.families.gpt2 import NoPositions, geometry_without_rotary
from hfpos.plan import freeze, swap_class
from hfpos.scheme import Geometry, PatchError, Rope
from hfpos.schemes.learned import Learned


if TYPE_CHECKING:
    from hfpos.plan import Edit

TABLE_NAMES = ("wpe", "embed_positions")


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
    seams = ("bias", "embed", "none")

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
        if not calls_interface(owner):
            return "its attention does not go through Transformers' attention interface"
        return None

    def native(self) -> str:
        return "learned"

    def geometry(self) -> Geometry:
        length = getattr(self.config, "max_position_embeddings", None)
        return geometry_without_rotary(self.config.num_attention_heads, self.config.hidden_size, length)

    def probe_positions(self, geometry: Geometry) -> None:
        return None

    def positions_off(self, config: Any) -> list[Edit]:
        ((owner, name),) = tables(self.model)
        table = getattr(owner, name)
        return [swap_class(table, NoPositions), freeze(table)]

    def rotary_edits(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> tuple[list[Edit], bool, dict]:
        raise PatchError(
            f"{scheme.name!r} rotates queries and keys before they are cached, for which {self.name} has no seam"
        )
