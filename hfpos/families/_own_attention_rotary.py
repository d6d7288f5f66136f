"""Decoders with rotary embeddings in an attention of their own: schemes inside attention move it to Transformers' interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from hfpos.families._own_attention import moved, source_edits
from hfpos.families._rotary import RotaryDecoder


if TYPE_CHECKING:
    from hfpos.plan import Edit
    from hfpos.positions import PositionHook


class OwnAttentionRotary(RotaryDecoder):
    """Base of these families. All other schemes leave the attention as it is.

    Attributes:
        layer_class: what a layer becomes, which hands its attention a `Call` in the place of something else.
        attention_name: the attribute of a layer that holds its attention.
        attention_class: what that becomes; it still turns queries and keys by the model's own cos and sin.
        writes_mask: whether the decoder writes every mask out, also a plain causal one.
    """

    name = ""
    priority = 1
    layer_class: ClassVar[type]
    attention_name: ClassVar[str]
    attention_class: ClassVar[type]
    writes_mask: ClassVar[bool] = False

    def layers(self) -> Any:
        """The decoder's layers."""
        return self.decoder.layers

    def reaches_attention(self) -> bool:
        return True  # once it is patched

    def backend(self) -> str | None:
        stock = super().backend()
        return "sdpa" if stock == "eager" and not self.decoder._supports_sdpa else stock

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        edits = super().layer_edits(hook)
        if hook.seam is None:
            return edits
        hook.passes_call = False
        for layer in self.layers():
            attention = getattr(layer, self.attention_name)
            edits += moved(layer, self.layer_class, attention, self.attention_class, self.new_rotary.config)
        return edits + source_edits(self.decoder, self.layers(), hook, self.writes_mask)
