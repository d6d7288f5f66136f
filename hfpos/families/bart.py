"""BART and what is built alike: mBART, PLBart, Blenderbot, Pegasus, Marian; a table of positions in each stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from hfpos.families._directions import attention_modules, calls_interface
from hfpos.families._stacks import Stack, Stacks
from hfpos.families._tables import RowsInPlace, offset_of, resized_table, switched_off
from hfpos.families._without_rotary import geometry_without_rotary
from hfpos.plan import Hook, Swap
from hfpos.scheme import Geometry, PatchError, Scheme
from hfpos.schemes.encoder_decoder import EncoderDecoder
from hfpos.schemes.learned import Learned


if TYPE_CHECKING:
    from hfpos.plan import Edit, Plan
    from hfpos.positions import PositionHook


class BartStack(Stack):
    """One stack, which adds a table of positions to its token embeddings."""

    trained_kind = Learned

    def __init__(self, model: PreTrainedModel, family: str) -> None:
        super().__init__(model, family)
        self.table: Any = self.decoder.embed_positions
        self.resized: Any = None

    def native(self) -> str:
        return "sinusoidal" if "Sinusoidal" in type(self.table).__name__ else "learned"

    def geometry(self) -> Geometry:
        attention = attention_modules(self.decoder)[0]
        rows = self.table.num_embeddings - offset_of(self.table)
        return geometry_without_rotary(attention.num_heads, attention.num_heads * attention.head_dim, rows)

    def cross_attention(self) -> list[Any]:
        return [layer.encoder_attn for layer in self.decoder.layers if hasattr(layer, "encoder_attn")]

    def positions_off(self, config: Any) -> list[Edit]:
        return switched_off(self.table)

    def resize_edits(self, scheme: Any, config: Any) -> list[Edit]:
        self.resized = resized_table(self.table, scheme)
        return [Swap(self.decoder, "embed_positions", self.table, self.resized)]

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        edits = super().layer_edits(hook)
        if self.resized is not None:
            edits.append(Hook(self.resized, "register_forward_hook", RowsInPlace(hook)))
        return edits

    def plan(self, scheme: Scheme, root: nn.Module, tokenizer: Any = None, backend: str = "auto") -> Plan:
        scale = getattr(self.decoder, "embed_scale", 1.0)
        if scheme.seam == "embed" and scale != 1.0 and not self.resizes(scheme):
            raise PatchError(
                f"{scheme.name!r} adds positions to embeddings that {type(self.model).__name__} would then not multiply by its embed_scale="
                f"{scale:g}; use a scheme inside attention, e.g. rope or alibi"
            )
        return super().plan(scheme, root, tokenizer, backend)


class Bart(Stacks):
    """BART and its heads."""

    name = "bart"
    trained_kind = Learned

    @classmethod
    def find_stacks(cls, model: PreTrainedModel) -> list[Any]:
        """The encoder and the decoder."""
        found = [
            each for each in model.modules() if isinstance(each, PreTrainedModel) and hasattr(each, "embed_positions")
        ]
        return sorted(found, key=lambda stack: hasattr(stack.layers[0], "encoder_attn"))

    @classmethod
    def find_decoder(cls, model: PreTrainedModel) -> Any:
        return cls.find_stacks(model)[-1]

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        if not model.config.is_encoder_decoder:
            return "it is not an encoder-decoder"
        owners = [each for each in model.modules() if hasattr(each, "embed_positions")]
        tables = [isinstance(each.embed_positions, nn.Embedding) and hasattr(each, "embed_tokens") for each in owners]
        if len(owners) != 2 or not all(tables):
            return "it does not add a table of positions (embed_positions) to tokens in each of two stacks"
        stray = [each for each in owners if not isinstance(each, PreTrainedModel) or not calls_interface(each)]
        return f"the attention of its {type(stray[0]).__name__} is not on Transformers' interface" if stray else None

    def stacks(self) -> dict[str, Stack]:
        encoder, decoder = (BartStack(stack, self.name) for stack in self.find_stacks(self.model))
        return {"encoder": encoder, "decoder": decoder}

    def native(self) -> str:
        return self.stacks()["decoder"].native()

    def schemes(self, scheme: Scheme) -> dict[str, Scheme | None]:
        if isinstance(scheme, EncoderDecoder) and any(self.resizes(each) for each in scheme.distinct()):
            raise PatchError(
                f"encoder_decoder: {type(self.model).__name__} states one length for the tables of both stacks; resize them together, "
                'hfpos.patch(model, "learned", target_length=...)'
            )
        return super().schemes(scheme)
