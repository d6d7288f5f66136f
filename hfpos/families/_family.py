"""`Family`: what hfpos needs to know of a kind of model, and the edits that put a scheme into it."""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from hfpos.attention.bias import BiasedAttention
from hfpos.attention.fixed_rotary import FixedRotation
from hfpos.attention.interface import patched_backend
from hfpos.attention.layered import LayeredSeam
from hfpos.attention.learned import TABLE
from hfpos.attention.score import score_rotation
from hfpos.configuration import mark_adapters, own_copy, write_block
from hfpos.families._directions import both_ways, calls_interface, looks_both_ways
from hfpos.families._layers import layer_types
from hfpos.families._learned_weights import learned_edits, learned_of
from hfpos.families._seams import check_seam
from hfpos.plan import Added, Attribute, Hook, Plan, own_attribute, set_attribute
from hfpos.positions import PositionHook
from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, PatchError, Rope, Scheme
from hfpos.schemes.learned import Learned
from hfpos.schemes.per_layer import PerLayer


if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.attention.seam import Seam
    from hfpos.plan import Edit
    from hfpos.scheme import Bias


class Family(ABC):
    """One kind of model. A subclass says how its own positions are switched off and how a scheme gets in.

    Args:
        model: the model itself, or the language model a wrapper holds.
    """

    name: ClassVar[str] = ""
    priority: ClassVar[int] = 1
    trained_kind: ClassVar[type[Scheme]] = Scheme
    seams: ClassVar[tuple[str, ...]] = ("freq", "score", "bias", "embed", "none")
    hook_options: ClassVar[dict[str, Any]] = {}
    outside_attention: ClassVar[str] = "a scheme of the freq seam"

    def __init__(self, model: PreTrainedModel) -> None:
        # Any: what a model holds beside its weights is known to its family, not to a type checker
        self.model: Any = model
        self.decoder: Any = self.find_decoder(model)
        self.config: Any = self.decoder.config
        self.last_position = sys.maxsize  # that the planned patch has a row of a table for; else nothing ends

    @classmethod
    @abstractmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        """Why `model` is not of this family; None if it is."""

    @classmethod
    def find_decoder(cls, model: PreTrainedModel) -> nn.Module:
        """The module whose forward takes ids, masks and the cache, and runs the layers."""
        return model.base_model

    @abstractmethod
    def geometry(self) -> Geometry:
        """The numbers of the unpatched model."""

    @abstractmethod
    def native(self) -> str:
        """The registry name of the scheme that the unpatched model has."""

    @abstractmethod
    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        """The edits that switch the model's own positions off; `config` is the patched model's copy."""

    @abstractmethod
    def rotary_edits(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> tuple[list[Edit], bool, dict]:
        """For the freq seam: the edits, whether stock Transformers reloads the result equal, and options of the `PositionHook`."""

    def score_rotation(self) -> tuple[str, frozenset[int] | None]:
        """For the score seam: which dimensions the family rotates and how it pairs them, and the layers to rotate in (None: all)."""
        return "half", None

    def unscaled_frequencies(self, geometry: Geometry) -> torch.Tensor:
        """For the score seam: (rotary_dim / 2,) radians per token, of the model before any scaling."""
        return inverse_frequencies(geometry.theta, geometry.rotary_dim)

    def score_seam(self, scheme: Any, geometry: Geometry) -> Any:
        """For the score seam: what acts inside attention, by what the scheme has to say."""
        return score_rotation(scheme, geometry, *self.score_rotation(), self.unscaled_frequencies(geometry))

    def probe_positions(self, geometry: Geometry) -> list[int] | None:
        """Eight positions for the proof, some beyond the trained length; None where the unpatched model takes no position ids."""
        length = geometry.trained_length or geometry.allowed_length or 2048
        return [0, 1, length // 2, length - 1, length, 2 * length, 3 * length, 4 * length - 1]

    def unscaled_reference(self, scheme: Scheme) -> Scheme | None:
        """A scheme of the same seam that must leave short inputs as they are, where the seam takes over what the family does."""
        return None

    def stateful_modules(self) -> list[nn.Module]:
        """Modules of the unpatched model that remember something from call to call; the proof puts them back as they were."""
        return []

    def lengthen_tables(self, length: int) -> None:  # noqa: B027
        """Make what the unpatched `stateful_modules` keep for each position reach `length` tokens, for the proof."""

    def length_dependent(self) -> bool:
        """Whether in the unpatched model a token's output depends on tokens behind it, through the length of the call."""
        return False

    def resize_edits(self, scheme: Any, config: PreTrainedConfig) -> list[Edit]:
        """For a family whose native scheme is `learned`: the edits that resize its table."""
        raise TypeError(f"{type(self).__name__} does not resize its table of positions")

    def resizes(self, scheme: Scheme) -> bool:
        """Whether `scheme` is put in by resizing the model's own table of positions, so that the model stays a stock one."""
        return scheme.name == self.native() == "learned"

    def changed_layers(self) -> list[int]:
        """For a scheme of its own in each layer: those that must then give another output, which the proof looks at one by one."""
        return []

    def is_unchanged(self, scheme: Scheme, geometry: Geometry) -> bool:
        """Whether `scheme` with its parameters leaves this model's outputs as they are."""
        return False

    def length_keys(self) -> tuple[str, ...]:
        """The config attributes that hold the longest input allowed."""
        return ("max_position_embeddings",)

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        """The edits that let this family's layers take a `Call`."""
        return []

    def hook_edits(self, hook: PositionHook) -> list[Edit]:
        """The edits that put `hook` on the decoder and let the layers take its `Call`."""
        return [
            Hook(self.decoder, "register_forward_pre_hook", hook.before, {"with_kwargs": True}),
            Hook(self.decoder, "register_forward_hook", hook.after, {"with_kwargs": True}),
            *self.layer_edits(hook),
        ]

    def bidirectional(self) -> bool:
        """Whether tokens attend to those behind them."""
        return looks_both_ways(self.decoder)

    def position_options(self) -> dict[str, Any]:
        """Options of the `PositionHook`, whatever the scheme."""
        return {**self.hook_options, "bidirectional": self.bidirectional()}

    def learned_start(self, scheme: Bias, geometry: Geometry) -> dict[str, torch.Tensor]:
        """What the weights of a learned bias start from."""
        return scheme.weights(geometry)

    def reaches_attention(self) -> bool:
        """Whether a scheme can act inside this family's attention."""
        return calls_interface(self.decoder)

    def bias_scheme(self, scheme: Bias) -> Bias:
        """For the bias seam: `scheme` with what this family's own bias has that the paper's has not, where nothing was given instead."""
        return both_ways(scheme, self.model) if self.bidirectional() else scheme

    def default_layers(self, scheme: Scheme) -> list[int]:
        """The layers that get `scheme` where the user names none."""
        return list(range(len(layer_types(self.config))))

    def own_seam(self, geometry: Geometry) -> Seam | None:
        """For a layer that keeps its own positions while others change: what acts in it once the model's own are off."""
        raise PatchError(
            f"{type(self.model).__name__} ({self.name}) gives its positions to all layers at once, so single layers cannot keep them; give every "
            'layer a scheme: hfpos.patch(model, "per_layer", schemes=[...])'
        )

    def layer_seam(self, scheme: Any, geometry: Geometry) -> Seam | None:
        """What acts in one layer with `scheme` (None: its own positions) once the model's own are off; None where nothing does."""
        if scheme is None:
            return self.own_seam(geometry)
        if scheme.seam == "freq":
            return FixedRotation(*scheme.frequencies(geometry))
        if scheme.seam == "bias":
            return BiasedAttention(self.bias_scheme(scheme), geometry)
        return self.score_seam(scheme, geometry) if scheme.seam == "score" else None

    def layered_edits(
        self, schemes: list[Scheme | None], geometry: Geometry, config: Any
    ) -> tuple[list[Edit], list[Seam | None]]:
        """For a scheme of its own in each layer: the edits, and what acts in each layer."""
        for scheme in schemes:
            if scheme is not None:
                scheme.check(geometry)
        seams: list[Seam | None] = []
        for number, scheme in enumerate(schemes):
            alike = schemes.index(scheme)
            seams.append(seams[alike] if alike < number else self.layer_seam(scheme, geometry))
        return self.positions_off(config), seams

    def plan(self, scheme: Scheme, root: nn.Module, tokenizer: Any = None, backend: str = "auto") -> Plan:
        """Every edit that puts `scheme` into the model. Raises `PatchError` and changes nothing where that cannot work.

        Args:
            scheme: what to put in.
            root: the model as the caller holds it, possibly a wrapper around `self.model`.
            tokenizer: its `model_max_length` follows the patched length.
            backend: the attention implementation to stand on.
        """
        geometry = self.geometry()
        for each in scheme.distinct() if isinstance(scheme, PerLayer) else [scheme]:
            check_seam(self, each)
        scheme.check(geometry)
        whole, config, copied = own_copy(root, self.model.config, self.config)
        edits: list[Edit] = [*copied]
        length = scheme.patched_length(geometry)
        edits += self._length_edits(length, config)
        edits_of_scheme, more, stock = self._edits_of(scheme, geometry, config, whole)
        edits += edits_of_scheme
        options = self.position_options() | more
        if options.get("seam") is not None:
            config._attn_implementation = self._patched_backend(backend, options["seam"])
        elif backend != "auto":
            raise PatchError(
                f"{scheme.name!r} does not act inside attention, so backend={backend!r} has no meaning for it; choose the model's attention "
                "implementation with model.set_attn_implementation"
            )
        edits += self.hook_edits(PositionHook(self.decoder, **options))
        edits.append(Hook(self.model, "register_state_dict_pre_hook", mark_adapters))
        edits += self._tokenizer_edits(tokenizer, length)
        self._mark(scheme, whole, stock)
        return Plan(tuple(edits))

    def _edits_of(
        self, scheme: Any, geometry: Geometry, config: Any, whole: Any
    ) -> tuple[list[Edit], dict[str, Any], bool]:
        """The edits that belong to the scheme's seam, options of the `PositionHook`, and whether the result is a stock model."""
        if isinstance(scheme, PerLayer):
            edits, seams = self.layered_edits(scheme.of_layers(layer_types(self.config)), geometry, config)
            if not any(seams):
                return edits, {}, False
            options = {"seam": LayeredSeam(seams), "pins_prompt": scheme.pins_prompt}
            return edits + learned_edits(self, learned_of(scheme), geometry), options, False
        if self.resizes(scheme):
            return self.resize_edits(scheme, config), {}, True
        if scheme.seam == "freq":
            edits, stock, options = self.rotary_edits(scheme, geometry, config, whole)
            return edits, options, stock
        edits = self.positions_off(config)
        if scheme.seam == "bias":
            edits += learned_edits(self, scheme, geometry)
            return edits, {"seam": BiasedAttention(self.bias_scheme(scheme), geometry)}, False
        if scheme.seam == "score":
            pins_prompt = getattr(scheme, "pins_prompt", False)
            return edits, {"seam": self.score_seam(scheme, geometry), "pins_prompt": pins_prompt}, False
        if isinstance(scheme, Learned):
            return edits + self._table_edits(scheme, scheme.patched_length(geometry)), {"table": TABLE}, False
        return edits, {"table": scheme.table} if scheme.seam == "embed" else {}, False

    def backend(self) -> str | None:
        """The attention implementation that the patched model stands on."""
        return self.config._attn_implementation

    def _patched_backend(self, wanted: str, seam: Seam) -> str:
        """The registered name of the `wanted` backend, or of what the seam chooses where that is `auto`."""
        own = self.backend() or "sdpa"
        return patched_backend(seam.best(own) if wanted == "auto" else wanted, seam.backends)

    def _table_edits(self, scheme: Learned, length: int | None) -> list[Edit]:
        """The edit that puts a new table of positions, which the token embeddings get, into the decoder."""
        table = scheme.new_table(self.decoder.get_input_embeddings().weight.shape[1], length)
        self.last_position = table.weight.shape[0] - 1
        return [Added(self.decoder, TABLE, own_attribute(self.decoder, TABLE), table)]

    def _length_edits(self, length: int | None, config: PreTrainedConfig) -> list[Edit]:
        """Raise every stated limit to the patched length."""
        if length is None:
            return []
        limits = {getattr(self.config, key, None) for key in self.length_keys()} - {None}
        for key in self.length_keys():
            if getattr(config, key, None) is not None:
                setattr(config, key, length)
        generation = getattr(self.model, "generation_config", None)
        if generation is None or generation.max_length not in limits:
            return []
        generation = copy.deepcopy(generation)
        generation.max_length = length
        return [set_attribute(self.model, "generation_config", generation)]

    @staticmethod
    def _tokenizer_edits(tokenizer: Any, length: int | None) -> list[Edit]:
        if tokenizer is None or length is None:
            return []
        return [Attribute(tokenizer, "model_max_length", tokenizer.model_max_length, length)]

    def _mark(self, scheme: Scheme, config: Any, stock: bool) -> None:
        """Write the block that travels with the checkpoint; a resized table needs none, it is a stock model again."""
        if self.resizes(scheme):
            return
        write_block(config, self.model.config, scheme, stock)
