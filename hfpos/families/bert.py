"""BERT and what is built alike: RoBERTa, XLM-R, CamemBERT, ELECTRA, ERNIE, data2vec, DistilBERT, ALBERT; encoders and decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfpos.attention.fixed_rotary import FixedRotation
from hfpos.families._directions import attention_modules, calls_interface
from hfpos.families._family import Family
from hfpos.families._places import Places
from hfpos.families._tables import resized_table, switched_off
from hfpos.families._without_rotary import geometry_without_rotary
from hfpos.plan import Hook, Swap, set_attribute
from hfpos.scheme import Geometry, Rope
from hfpos.schemes.learned import Learned


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.plan import Edit
    from hfpos.positions import PositionHook

BY_POSITION = ("position_ids", "token_type_ids")  # buffers as long as the table


class Bert(Family):
    """A model whose `embeddings` add a learned table of positions, and whose attention goes through Transformers' interface."""

    name = "bert"
    trained_kind = Learned
    resized = False

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        embeddings: Any = getattr(model.base_model, "embeddings", None)
        children = embeddings.named_children() if isinstance(embeddings, nn.Module) else ()
        found = [name for name, _ in children if "position" in name]
        if found != ["position_embeddings"] or not isinstance(embeddings.position_embeddings, nn.Embedding):
            return "it has no embeddings with a table position_embeddings, and that alone"
        words = getattr(embeddings, "word_embeddings", None)
        as_wide = getattr(words, "embedding_dim", None) == embeddings.position_embeddings.embedding_dim
        if not as_wide or hasattr(embeddings, "token_dropout"):  # MobileBERT, ESM
            return "its embeddings do more than add words and positions up"
        if not all(hasattr(module, "attention_head_size") for module in attention_modules(model.base_model)):  # GIT
            return "it also has attention of another kind"
        return None if calls_interface(model.base_model) else "its attention is not on Transformers' interface"

    @property
    def embeddings(self) -> Any:
        """What adds words, positions and token types up."""
        return self.decoder.embeddings

    @property
    def first(self) -> int:
        """The row of the table for the first token: RoBERTa's kind count from behind the row of the padding."""
        padding = self.embeddings.position_embeddings.padding_idx
        return 0 if padding is None else padding + 1

    def native(self) -> str:
        return "sinusoidal" if getattr(self.config, "sinusoidal_pos_embds", False) else "learned"

    def geometry(self) -> Geometry:
        heads = self.config.num_attention_heads
        width = heads * attention_modules(self.decoder)[0].attention_head_size
        return geometry_without_rotary(heads, width, self.embeddings.position_embeddings.num_embeddings - self.first)

    def probe_positions(self, geometry: Geometry) -> None:
        return None

    def position_options(self) -> dict[str, Any]:
        padding = self.embeddings.position_embeddings.padding_idx
        return super().position_options() | {"first": self.first, "padding": padding}

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        return [*switched_off(self.embeddings.position_embeddings), *self._cross_attention()]

    def _cross_attention(self) -> list[Edit]:
        """The edits that let attention to another text be known as that."""
        owners = [module for module in self.decoder.modules() if getattr(module, "is_cross_attention", False)]
        return [set_attribute(owner.self, "is_cross_attention", True) for owner in owners]

    def rotary_edits(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> tuple[list[Edit], bool, dict]:
        return self.positions_off(config), False, {"seam": FixedRotation(*scheme.frequencies(geometry))}

    def resize_edits(self, scheme: Any, config: PreTrainedConfig) -> list[Edit]:
        table = self.embeddings.position_embeddings
        longer = resized_table(table, scheme, self.first)
        self.resized = True
        edits: list[Edit] = [Swap(self.embeddings, "position_embeddings", table, longer)]
        for name in BY_POSITION:
            buffer = getattr(self.embeddings, name, None)
            if buffer is not None:
                count = torch.arange(longer.num_embeddings, device=buffer.device)
                grown = count if name == "position_ids" else torch.zeros_like(count)
                edits.append(set_attribute(self.embeddings, name, grown.expand(1, -1)))
        return edits

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        hook.masks_packing = not self.resized  # which a saved copy, a stock model, would not do
        places = Places(hook, self.embeddings)
        return [Hook(self.embeddings, "register_forward_pre_hook", places, {"with_kwargs": True})]

    def _length_edits(self, length: int | None, config: Any) -> list[Edit]:
        edits = super()._length_edits(length, config)
        if length is not None:
            config.max_position_embeddings = length + self.first  # which counts rows of the table
        return edits
