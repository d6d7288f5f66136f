"""Decoders with an attention of their own that knows no other implementation; here it moves to Transformers' interface."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfpos.attention.bias import BiasedAttention
from hfpos.attention.dense import eager_attention, in_window
from hfpos.attention.interface import PREFIX
from hfpos.families._family import Family
from hfpos.families._without_rotary import PositionTables, geometry_without_rotary
from hfpos.plan import Hook, set_attribute, swap_class
from hfpos.position_ids import OuterPositionIds
from hfpos.positions import PositionHook
from hfpos.rotation import rotate
from hfpos.scheme import Geometry, Rope, Scheme
from hfpos.schemes.alibi import Alibi, alibi_slopes


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn
    from transformers import PreTrainedConfig

    from hfpos.attention.seam import Seam
    from hfpos.call import Call
    from hfpos.plan import Edit


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    call: Call,
    cache: Any,
    output_attentions: bool,
    convention: str = "half",
    window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What every such attention does between its two projections: rotate where the `call` says so, cache, and attend.

    Args:
        module: holds the `config` that names the implementation, and its `layer_idx` in the `cache`.
        query: (B, H, Q, D); key, value: (B, Hkv, Q, D).
        output_attentions: the weights are wanted, which only an eager implementation has.
        convention: how the family pairs the dimensions it rotates.
        window: how many of the last keys a query sees; None for all.

    Returns:
        the output (B, Q, H * D) and the weights (B, H, Q, K), if any.
    """
    if call.rotation is not None:
        cos, sin = (part.to(query.device) for part in call.rotation)
        query, key = rotate(query, cos, sin, convention), rotate(key, cos, sin, convention)
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    if window is not None:
        mask = in_window(mask, query.shape[2], key, call.total, window)
    backend = module.config._attn_implementation
    prefix = PREFIX if backend.startswith(PREFIX) else ""
    if prefix:
        kwargs["hfpos"] = call
        if call.part is not None:  # DeepSpeed asks for them
            kwargs["position_ids"] = call.q_positions
    # the weights, which these models always gave, and which there is no way to ask another implementation for
    if output_attentions:
        backend = f"{prefix}eager"
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention)
    output, weights = implementation(module, query, key, value, mask, **kwargs)
    return output.flatten(2), weights


def in_heads(hidden_states: torch.Tensor, projections: Iterable[Callable], head_dim: int) -> Iterator[torch.Tensor]:
    """Each of the `projections` of hidden_states (B, Q, E), split into heads: (B, H, Q, D)."""
    return (each(hidden_states).unflatten(-1, (-1, head_dim)).transpose(1, 2) for each in projections)


class CallAsPositionIds:
    """Mixed into the class of a layer that hands on no keyword arguments: the `Call` takes the place of the position ids.

    Of the forward under way, and as an argument, so that gradient checkpointing keeps it.
    """

    hfpos_source: PositionHook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Put it in."""
        return super().__call__(*args, **kwargs | {"position_ids": self.hfpos_source.call})  # type: ignore[misc]


def no_bias(*args: Any, **kwargs: Any) -> None:
    """Stands in for a decoder's own bias, which is not used."""


class OwnMask:
    """Forward pre-hook of a decoder that writes every mask out: makes the mask here, where none is needed for a plain causal one.

    The layers fetch it, and the `Call`, when they are called, so that gradient checkpointing keeps both as arguments.
    """

    def __init__(self, source: PositionHook) -> None:
        self.source = source
        self.mask: Any = None

    @property
    def call(self) -> Call | None:
        """The `Call` of the forward under way."""
        return self.source.call

    def before(self, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Make the mask, and give the decoder a 4-D one of no size, which it takes as it is."""
        tokens = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        like = torch.empty((*tokens.shape[:2], 0), device=tokens.device, dtype=module.dtype)
        self.mask = create_causal_mask(
            module.config, like, kwargs.get("attention_mask"), kwargs.get("past_key_values")
        )
        return args, kwargs | {"attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=tokens.device)}

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The forward hook: lets go of the mask."""
        self.mask = None


def moved(
    layer: Any, layer_class: type, attention: Any, attention_class: type, config: PreTrainedConfig
) -> list[Edit]:
    """The edits that move one layer's attention to the interface; `config` names the implementation."""
    return [
        swap_class(layer, layer_class),
        swap_class(attention, attention_class),
        set_attribute(attention, "config", config),
    ]


def source_edits(decoder: Any, layers: Any, hook: PositionHook, writes_mask: bool) -> list[Edit]:
    """The edits that tell moved `layers` where the `Call` of the forward under way is, and the mask where the decoder writes each out."""
    source: PositionHook | OwnMask = hook
    edits: list[Edit] = []
    if writes_mask:
        source = OwnMask(hook)
        edits.append(Hook(decoder, "register_forward_pre_hook", source.before, {"with_kwargs": True}))
        edits.append(Hook(decoder, "register_forward_hook", source.after))
    return [*edits, *(set_attribute(layer, "hfpos_source", source) for layer in layers)]


class OwnAttention(Family):
    """Base of these families. A subclass names its layers, and switches its own positions off.

    Attributes:
        length_key: the config attribute that holds the trained length.
        layer_class: what a layer becomes, which hands its attention a `Call` in the place of something else.
        attention_name: the attribute of a layer that holds its attention.
        attention_class: what that becomes.
        writes_mask: whether the decoder writes every mask out, also a plain causal one.
        keeps_position_ids: whether the head does not hand `position_ids` on to the decoder.
    """

    hook_options = {"passes_call": False, "masks_packing": True}  # noqa: RUF012
    length_key: ClassVar[str] = "max_position_embeddings"
    layer_class: ClassVar[type]
    attention_name: ClassVar[str] = "attn"
    attention_class: ClassVar[type]
    writes_mask: ClassVar[bool] = False
    keeps_position_ids: ClassVar[bool] = False

    def layers(self) -> Any:
        """The decoder's layers."""
        return self.decoder.h

    def geometry(self) -> Geometry:
        length = getattr(self.config, self.length_key, None)
        return geometry_without_rotary(self.config.num_attention_heads, self.config.hidden_size, length)

    def attention_of(self, layer: Any) -> Any:
        """The attention in a layer."""
        return getattr(layer, self.attention_name)

    def length_keys(self) -> tuple[str, ...]:
        return (self.length_key,)

    def reaches_attention(self) -> bool:
        return True  # once it is patched

    def backend(self) -> str | None:
        stock = super().backend()
        # where eager is all that the stock model has, it need not be here
        return "sdpa" if stock == "eager" and not self.decoder._supports_sdpa else stock

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        config._attn_implementation = self.backend()
        edits: list[Edit] = []
        for layer in self.layers():
            edits += moved(layer, self.layer_class, self.attention_of(layer), self.attention_class, config)
        return edits

    def rotary_edits(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> tuple[list[Edit], bool, dict]:
        return self.positions_off(config), False, {"rotation": PositionTables(scheme, geometry)}

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        edits = source_edits(self.decoder, self.layers(), hook, self.writes_mask)
        if self.keeps_position_ids and self.model is not self.decoder:
            edits.append(Hook(self.model, "register_forward_pre_hook", OuterPositionIds(hook), {"with_kwargs": True}))
        return edits


class OwnAlibi(OwnAttention):
    """Base of those whose own positions are ALiBi."""

    trained_kind = Alibi
    writes_mask = True
    keeps_position_ids = True

    def own_slopes(self) -> list[float]:
        """The slope of each head that the model was trained with, as it is applied to the scaled logits."""
        return alibi_slopes(self.config.num_attention_heads)

    def native(self) -> str:
        return "alibi"

    def probe_positions(self, geometry: Geometry) -> None:
        return None

    def own_seam(self, geometry: Geometry) -> Seam:
        return BiasedAttention(self.bias_scheme(Alibi()), geometry)

    def bias_scheme(self, scheme: Any) -> Any:
        if isinstance(scheme, Alibi) and scheme.slopes is None:
            return dataclasses.replace(scheme, slopes=self.own_slopes())
        return scheme

    def is_unchanged(self, scheme: Scheme, geometry: Geometry) -> bool:
        return isinstance(scheme, Alibi) and self.bias_scheme(scheme).head_slopes(geometry.heads) == self.own_slopes()
