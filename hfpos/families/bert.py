"""BERT and what is built alike: RoBERTa, XLM-R, CamemBERT, ELECTRA, ERNIE, data2vec, DistilBERT, ALBERT; encoders and decoders."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfpos.attention.fixed_rotary import FixedRotation
from hfpos.families._directions import attention_modules, calls_interface
from hfpos.families._family import Family
from hfpos.families._tables import resized_table
from hfpos.families.gpt2 import NoPositions, geometry_without_rotary
from hfpos.plan import Hook, Swap, freeze, set_attribute, swap_class
from hfpos.scheme import Geometry, PatchError, Rope
from hfpos.schemes.learned import Learned


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.plan import Edit
    from hfpos.positions import PositionHook

BY_POSITION = ("position_ids", "token_type_ids")  # buffers as long as the table


class Places:
    """Forward pre-hook of the embeddings: tells them where tokens stand, as their own buffers end where the trained table does."""

    def __init__(self, source: PositionHook, embeddings: nn.Module) -> None:
        self.source = source
        self.arguments = [name for name in inspect.signature(type(embeddings).forward).parameters if name != "self"]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Put in the position ids, and the token types that the model would take from a buffer."""
        if self.source.positions is None:
            return None
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        tokens = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"][..., 0] if tokens is None else tokens
        places = self.source.positions.to(tokens.device) + self.source.first
        kwargs["position_ids"] = places.expand(tokens.shape[0], -1)
        if "token_type_ids" in self.arguments and kwargs.get("token_type_ids") is None:
            kwargs["token_type_ids"] = torch.zeros_like(tokens, dtype=torch.int64)
        return (), kwargs


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
        table = self.embeddings.position_embeddings
        if type(table) is not nn.Embedding:
            raise PatchError(
                f"the position table is a {type(table).__name__}, which cannot be switched off; expected an nn.Embedding: patch the model "
                "before anything wraps its table"
            )
        return [swap_class(table, NoPositions), freeze(table), *self._cross_attention()]

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
