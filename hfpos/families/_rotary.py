"""The generic decoder with rotary embeddings: LLaMA, Mistral, Qwen, Gemma, Phi-3, OLMo, GPT-NeoX and whatever is built alike."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch

from hfpos.configuration import reloads_equal
from hfpos.families._directions import attention_modules
from hfpos.families._family import Family
from hfpos.families._handover import handover_edits
from hfpos.families._layered_rotary import LayeredRotary
from hfpos.families._layers import layer_types
from hfpos.families._measured_rotation import measure_rotation
from hfpos.families._rotary_config import no_single_rotary, rotary_geometry, scaled_type, text_rotaries
from hfpos.families._rotary_module import RotarySwap, check_obeys, find_convention, fix, frequency_names, scaling_name
from hfpos.families._windows import refuse_within_windows
from hfpos.plan import Hook
from hfpos.position_ids import MaskedPositionIds, TruePositions
from hfpos.positions import PositionHook
from hfpos.probe import can_run, probe
from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, PatchError, Rope, Scheme
from hfpos.schemes._remapping import Remapping
from hfpos.schemes.dynamic import Dynamic
from hfpos.schemes.longrope import as_divisors
from hfpos.schemes.per_layer import PerLayer


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.attention.seam import Seam
    from hfpos.plan import Edit

# Keys of rope_parameters that say how to scale; all others (what splits a head, a family's own) stay when a scheme is written.
SCALING_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
}


class RotaryDecoder(Family):
    """Any decoder that owns one rotary module and hands its cos and sin to every layer."""

    name = "rotary"
    priority = 0
    trained_kind = Rope

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        ((_, self.rotary_name, self.rotary),) = text_rotaries(model)
        self.new_rotary: Any = self.rotary
        self.layered: LayeredRotary | None = None
        self.layer_type = scaled_type(self.config.rope_parameters)
        self.parameters = self.parameters_of(self.layer_type)
        self.buffer = self.buffer_of(self.layer_type)

    @classmethod
    def find_decoder(cls, model: PreTrainedModel) -> Any:
        return text_rotaries(model)[0][0]

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        return no_single_rotary(model)

    def native(self) -> str:
        kind = self.parameters.get("rope_type", "default")
        return "rope" if kind == "default" else kind

    def geometry(self) -> Geometry:
        return self.geometry_of(self.layer_type)

    def parameters_of(self, kind: str | None) -> dict[str, Any]:
        """The rope parameters of layers of one type."""
        return self.config.rope_parameters if self.layer_type is None else self.config.rope_parameters[kind]

    def buffer_of(self, kind: str | None) -> str:
        """The buffer of the rotary module that holds the frequencies of layers of one type."""
        return "inv_freq" if self.layer_type is None else f"{kind}_inv_freq"

    def geometry_of(self, layer_type: str | None) -> Geometry:
        """The numbers of the unpatched model's layers of one type."""
        rotary_dim = 2 * getattr(self.rotary, self.buffer_of(layer_type)).shape[-1]
        return rotary_geometry(self.config, self.parameters_of(layer_type), rotary_dim, self._head_dim(layer_type))

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        rotary = self.build_unscaled(config, self.layer_type)
        rotary.config = config  # by which it is known as the decoder's own
        keep = self._kept_when_off()
        names = [name for name in frequency_names(rotary) if name not in keep]
        still = {name: torch.zeros_like(getattr(rotary, name)) for name in names}
        moving = {name: getattr(rotary, name).clone() for name in keep}
        scales = {name: getattr(rotary, scaling_name(name)) for name in keep} | dict.fromkeys(still, 1.0)
        return self.swap(fix(rotary, still | moving, scales))

    def rotary_edits(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> tuple[list[Edit], bool, dict]:
        self.check_unscaled(config, geometry, self.layer_type)
        wanted, scale = scheme.frequencies(geometry)
        # Transformers' own float32 values where they are the scheme's (then a stock reload is bit-equal), else the scheme's
        rotary = self._built_by_stock(scheme, geometry, config, whole)
        stock = rotary is not None
        if not stock:
            config.rope_parameters = copy.deepcopy(self.config.rope_parameters)
            rotary = self.build(config)
        names = frequency_names(rotary)
        frequencies = {name: getattr(rotary, name).clone() for name in names}
        scales = {name: getattr(rotary, scaling_name(name)) for name in names}
        if not stock:
            frequencies[self.buffer], scales[self.buffer] = wanted.float(), scale
            # else its forward would recompute what is fixed here
            rotary.rope_type = (
                "default" if self.layer_type is None else rotary.rope_type | {self.layer_type: "default"}
            )
        return self.swap(fix(rotary, frequencies, scales)), stock, {}

    def _built_by_stock(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> Any:
        """The rotary module that Transformers itself makes of `config` with the scheme written into it; None where it cannot say it."""
        wanted, scale = scheme.frequencies(geometry)
        for parameters in (scheme.stock(geometry), as_divisors(scheme, geometry)):
            if parameters is None:
                continue
            config.rope_parameters = self._with(parameters, self.layer_type)
            with contextlib.suppress(PatchError):
                rotary = self.build(config)
                if not reloads_equal(whole, config):
                    continue  # the config's class takes no such type
                built, factor = getattr(rotary, self.buffer), getattr(rotary, scaling_name(self.buffer))
                equal = built.shape == wanted.shape and torch.allclose(built.double(), wanted, rtol=1e-5, atol=0)
                return rotary if equal and abs(factor - scale) < 1e-6 else None
        return None

    def default_layers(self, scheme: Scheme) -> list[int]:
        types = layer_types(self.config)
        whole = self.layer_type is None or scheme.seam not in ("freq", "score")
        return [index for index, kind in enumerate(types) if whole or kind == self.layer_type]

    def layered_edits(
        self, schemes: list[Scheme | None], geometry: Geometry, config: Any
    ) -> tuple[list[Edit], list[Seam | None]]:
        self.layered = LayeredRotary(self, schemes, config)
        return self.layered.edits(), self.layered.seams

    def changed_layers(self) -> list[int]:
        return self.layered.changed if self.layered else []

    def is_unchanged(self, scheme: Any, geometry: Geometry) -> bool:
        if self.layered:
            return not self.layered.changed
        if scheme.seam != "freq" or self.native() in ("dynamic", "longrope"):
            return False
        names = frequency_names(self.rotary)
        same_scale = getattr(self.rotary, scaling_name(self.buffer)) == getattr(
            self.new_rotary, scaling_name(self.buffer)
        )
        return same_scale and all(
            torch.allclose(
                getattr(self.rotary, name).float().cpu(), getattr(self.new_rotary, name).cpu(), rtol=1e-6, atol=0
            )
            for name in names
        )

    def score_rotation(self) -> tuple[str, frozenset[int] | None]:
        chooser = next((key for key in self.config.to_dict() if "indexer" in key or key == "index_topk"), None)
        if chooser is not None:
            raise PatchError(
                f"{type(self.model).__name__} also rotates where it chooses keys ({chooser}), which the score seam does not reach. Use a scheme "
                "of the freq seam, e.g. cache='pinned' with a target_length"
            )
        if can_run(self.model):
            another = type(self)(self.model)  # as it has edits of its own to plan
            try:
                return measure_rotation(another, lambda positions: probe(another, positions))
            except (ValueError, RuntimeError) as error:
                if isinstance(error, PatchError):
                    raise
                # kernels that run on no CPU (Liger's) where the weights still are; what they do is known below
        layers = None
        if self.layer_type is not None:
            layers = frozenset(i for i, kind in enumerate(layer_types(self.config)) if kind == self.layer_type)
        return find_convention(self.decoder, self.build(self.config), self.layer_type), layers

    def score_seam(self, scheme: Any, geometry: Geometry) -> Any:
        seam = super().score_seam(scheme, geometry)
        if isinstance(scheme, Remapping):
            refuse_within_windows(scheme, geometry, self.config, seam.layers, type(self.model).__name__)
        return seam

    def unscaled_frequencies(self, geometry: Geometry) -> torch.Tensor:
        formula = super().unscaled_frequencies(geometry).float()
        own = getattr(self.build_unscaled(self.config, self.layer_type), self.buffer)
        # The family's own differ in the last bit. Inside DeepSpeed's `zero.Init` they would be rounded to bfloat16.
        near = own.shape == formula.shape and torch.allclose(own.float(), formula, rtol=1e-6, atol=0)
        return own if near else formula

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        edits: list[Edit] = [
            Hook(self.new_rotary, "register_forward_pre_hook", TruePositions(hook, 1), {"with_kwargs": True})
        ]
        if hook.seam is not None:
            edits += handover_edits(self.decoder)
        if self.model.config is not self.config:
            outer = MaskedPositionIds(self.model)
            edits.append(Hook(self.model, "register_forward_pre_hook", outer, {"with_kwargs": True}))
        return edits

    def unscaled_reference(self, scheme: Any) -> Dynamic | None:
        parts: list[Any] = scheme.distinct() if isinstance(scheme, PerLayer) else [scheme]
        taken_over = [each for each in parts if each.seam == "score" and self.native() == "rope"]
        return Dynamic(original_length=getattr(taken_over[0], "original_length", None)) if taken_over else None

    def stateful_modules(self) -> list[nn.Module]:
        return [self.rotary]

    def length_dependent(self) -> bool:
        # the types for which Transformers' rotary embeddings compute their frequencies anew by the length of the call
        kinds = getattr(self.rotary, "rope_type", "")
        return any(
            "dynamic" in kind or kind == "longrope"
            for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])
        )

    def plan(self, scheme: Any, root: nn.Module, tokenizer: Any = None, backend: str = "auto") -> Any:
        self._scoring = scheme.seam == "score"
        return super().plan(scheme, root, tokenizer, backend)

    def _kept_when_off(self) -> list[str]:
        """The frequencies that stay in place: those of the layers that the score seam leaves alone."""
        if not (self.layer_type and self._scoring):
            return []
        return [name for name in frequency_names(self.rotary) if name != self.buffer]

    def _head_dim(self, kind: str | None) -> int | None:
        """How wide queries are in layers of one type, as their attention says: where keys are compressed (DeepSeek), wider than their rotated part."""
        types = layer_types(self.config)
        widths = {
            getattr(module, "qk_head_dim", getattr(module, "head_dim", None))
            for module in attention_modules(self.decoder)
            if self.layer_type is None or types[module.layer_idx] == kind
        }
        return widths.pop() if len(widths) == 1 else None

    def _with(self, parameters: dict[str, Any], kind: str | None) -> dict[str, Any]:
        """The config's rope parameters with those of one type of layer replaced; what splits a head stays the model's own."""
        own = self.parameters_of(kind)
        foreign = {key: value for key, value in own.items() if key not in SCALING_KEYS}
        if foreign.keys() - {"partial_rotary_factor"} and "original_max_position_embeddings" in own:
            foreign["original_max_position_embeddings"] = own["original_max_position_embeddings"]
        parameters = foreign | parameters
        if self.layer_type is None:
            return parameters
        return copy.deepcopy(self.config.rope_parameters) | {kind: parameters}

    def build(self, config: PreTrainedConfig) -> Any:
        """A new rotary module of the family's own class."""
        try:
            with torch.device("cpu"):
                return type(self.rotary)(config)
        except Exception as error:
            raise PatchError(
                f"{type(self.rotary).__name__} cannot be built with rope_parameters {config.rope_parameters}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def build_unscaled(self, config: PreTrainedConfig, kind: str | None) -> Any:
        """A new rotary module whose layers of one type rotate by the unscaled frequencies."""
        unscaled = copy.deepcopy(config)
        theta = self.parameters_of(kind)["rope_theta"]
        unscaled.rope_parameters = self._with({"rope_type": "default", "rope_theta": theta}, kind)
        return self.build(unscaled)

    def swap(self, rotary: Any) -> list[Edit]:
        """The edit that puts the fixed `rotary` in, once its forward has shown that it goes by its frequencies."""
        check_obeys(rotary, type(self.rotary).__name__)
        self.new_rotary = rotary
        return [RotarySwap(self.decoder, self.rotary_name, self.rotary, rotary, self.config)]

    def check_unscaled(self, config: PreTrainedConfig, geometry: Geometry, kind: str | None) -> None:
        """Raise `PatchError` unless the family's unscaled frequencies are the usual ones, which every scaling starts from."""
        found = getattr(self.build_unscaled(config, kind), self.buffer_of(kind)).double()
        expected = inverse_frequencies(geometry.theta, geometry.rotary_dim)
        # loosely, as inside DeepSpeed's `zero.Init` Transformers computes its frequencies in bfloat16
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0.05, atol=0):
            raise PatchError(
                f"the unscaled frequencies of {type(self.rotary).__name__} are not theta ** (-2 i / d) with theta={geometry.theta:g}, "
                f"d={geometry.rotary_dim}; a scaling has no meaning for them"
            )
