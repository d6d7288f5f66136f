"""The generic decoder with rotary embeddings: LLaMA, Mistral, Qwen, Gemma, Phi-3, OLMo, GPT-NeoX and whatever is built alike."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hfpos.families._family import Family
from hfpos.families._rotary_module import fix, frequency_names, scaling_name
from hfpos.plan import Hook, swap_module
from hfpos.positions import PositionHook, TruePositions
from hfpos.rotation import CONVENTIONS, inverse_frequencies, rotate
from hfpos.scheme import Geometry, PatchError, Rope


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.plan import Edit

FULL = "full_attention"  # the type of layer that is scaled where a config nests its parameters by type


def rope_modules(decoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """The rotary modules inside `decoder` with their dotted names."""
    return [(name, module) for name, module in decoder.named_modules() if frequency_names(module)]


class RotaryDecoder(Family):
    """Any decoder that owns one rotary module and hands its cos and sin to every layer."""

    name = "rotary"
    priority = 0
    trained_kind = Rope

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.rotary: Any
        (self.rotary_name, self.rotary), *_ = rope_modules(self.decoder)
        self.new_rotary = self.rotary
        parameters = self.config.rope_parameters
        self.nested = any(isinstance(value, dict) for value in parameters.values())
        self.parameters: dict[str, Any] = parameters[FULL] if self.nested else parameters
        self.buffer = f"{FULL}_inv_freq" if self.nested else "inv_freq"

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        modules = rope_modules(model.base_model)
        parameters = getattr(model.config, "rope_parameters", None)
        if not modules:
            return "it has no rotary embedding"
        if len(modules) > 1 or "." in modules[0][0]:
            return f"it computes rotary embeddings in {len(modules)} places ({modules[0][0]} ...), not once for all layers"
        if not isinstance(parameters, dict) or not parameters:
            return "its config has no rope_parameters"
        if any(isinstance(value, dict) for value in parameters.values()) and not isinstance(
            parameters.get(FULL), dict
        ):
            return f"its config nests rope_parameters by {sorted(parameters)}, none of which is {FULL!r}"
        names = frequency_names(modules[0][1])
        if names != ["inv_freq"] and f"{FULL}_inv_freq" not in names:
            return f"its rotary module keeps its frequencies as {names}"
        return None

    def native(self) -> str:
        kind = self.parameters.get("rope_type", "default")
        return "rope" if kind == "default" else kind

    def geometry(self) -> Geometry:
        config, kind = self.config, self.parameters.get("rope_type", "default")
        if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            raise PatchError(
                f"the config's rope_type {kind!r} is unknown to Transformers; expected one of "
                f"{', '.join(['default', *sorted(ROPE_INIT_FUNCTIONS)])}: correct config.rope_parameters"
            )
        theta = self.parameters.get("rope_theta")
        if not isinstance(theta, (int, float)):
            raise PatchError(
                f"the config's rope_parameters have no rope_theta: {self.parameters}; set it before the model is built"
            )
        heads = config.num_attention_heads
        allowed = getattr(config, "max_position_embeddings", None)
        stated = self.parameters.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if stated is not None and allowed is not None and stated > allowed:
            raise PatchError(
                f"the config states original_max_position_embeddings={stated} but max_position_embeddings={allowed}, which is shorter; "
                "correct one of them before the model is built"
            )
        problem = None
        if stated is None and self.parameters.get("factor", 1) != 1 and kind != "dynamic":
            problem = (
                f"the model is already scaled ({kind}, factor {self.parameters['factor']}) and its config does not state the length it "
                "was pretrained at"
            )
        return Geometry(
            heads=heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            rotary_dim=2 * getattr(self.rotary, self.buffer).shape[-1],
            theta=float(theta),
            trained_length=None if problem else stated or allowed,
            trained_length_stated=stated is not None,
            allowed_length=allowed,
            length_problem=problem,
        )

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        unscaled = copy.deepcopy(config)
        unscaled.rope_parameters = self._with({"rope_type": "default", "rope_theta": self.parameters["rope_theta"]})
        rotary = self._build(unscaled)
        keep = self._kept_when_off()
        names = [name for name in frequency_names(rotary) if name not in keep]
        still = {name: torch.zeros_like(getattr(rotary, name)) for name in names}
        moving = {name: getattr(rotary, name).clone() for name in keep}
        scales = {name: getattr(rotary, scaling_name(name)) for name in keep} | dict.fromkeys(still, 1.0)
        return self._swap(fix(rotary, still | moving, scales))

    def rotary_edits(
        self, scheme: Rope, geometry: Geometry, config: PreTrainedConfig
    ) -> tuple[list[Edit], bool, dict]:
        self._check_unscaled(config, geometry)
        wanted, scale = scheme.frequencies(geometry)
        parameters = scheme.stock(geometry)
        stock = False
        if parameters is not None:
            config.rope_parameters = self._with(parameters)
            rotary = self._build(config)
            built, factor = getattr(rotary, self.buffer), getattr(rotary, scaling_name(self.buffer))
            # Transformers' own float32 values where they are the scheme's (then a stock reload is bit-equal), else the scheme's
            stock = built.shape == wanted.shape and torch.allclose(built.double(), wanted, rtol=1e-5, atol=0)
            stock = stock and abs(factor - scale) < 1e-6
        if not stock:
            config.rope_parameters = copy.deepcopy(self.config.rope_parameters)
            rotary = self._build(config)
        names = frequency_names(rotary)
        frequencies = {name: getattr(rotary, name).clone() for name in names}
        scales = {name: getattr(rotary, scaling_name(name)) for name in names}
        if not stock:
            frequencies[self.buffer], scales[self.buffer] = wanted.float(), scale
            if not self.nested:
                rotary.rope_type = "default"  # else its forward would recompute what is fixed here
            else:
                rotary.rope_type = rotary.rope_type | {FULL: "default"}
        return self._swap(fix(rotary, frequencies, scales)), stock, {}

    def is_unchanged(self, scheme: Any, geometry: Geometry) -> bool:
        if scheme.seam != "freq" or self.native() in ("dynamic", "longrope"):
            return False
        names = frequency_names(self.rotary)
        same_scale = getattr(self.rotary, scaling_name(self.buffer)) == getattr(
            self.new_rotary, scaling_name(self.buffer)
        )
        return same_scale and all(
            torch.equal(getattr(self.rotary, name).float().cpu(), getattr(self.new_rotary, name).cpu())
            for name in names
        )

    def score_rotation(self) -> tuple[str, str | None]:
        if any(flag == 0 for flag in getattr(self.config, "no_rope_layers", None) or []):
            raise PatchError(
                f"{type(self.model).__name__} rotates only in some of its layers; the score seam rotates in all. Use a scheme of the freq "
                "seam, e.g. cache='pinned' with a target_length"
            )
        return self._convention(), FULL if self.nested else None

    def layer_edits(self, hook: PositionHook) -> list[Edit]:
        return [Hook(self.new_rotary, "register_forward_pre_hook", TruePositions(hook, 1), {"with_kwargs": True})]

    def stateful_modules(self) -> list[nn.Module]:
        return [self.rotary]

    def plan(self, scheme: Any, root: nn.Module, tokenizer: Any = None) -> Any:
        self._scoring = scheme.seam == "score"
        return super().plan(scheme, root, tokenizer)

    def _kept_when_off(self) -> list[str]:
        """The frequencies that stay in place: those of the layers that the score seam leaves alone."""
        if not (self.nested and self._scoring):
            return []
        return [name for name in frequency_names(self.rotary) if name != self.buffer]

    def _with(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The config's rope parameters with those of the scaled layers replaced; what splits a head stays the model's own."""
        if "partial_rotary_factor" in self.parameters:
            parameters = {"partial_rotary_factor": self.parameters["partial_rotary_factor"]} | parameters
        if not self.nested:
            return parameters
        return copy.deepcopy(self.config.rope_parameters) | {FULL: parameters}

    def _build(self, config: PreTrainedConfig) -> Any:
        """A new rotary module of the family's own class."""
        try:
            with torch.device("cpu"):
                return type(self.rotary)(config)
        except Exception as error:
            raise PatchError(
                f"{type(self.rotary).__name__} cannot be built with rope_parameters {config.rope_parameters}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _swap(self, rotary: nn.Module) -> list[Edit]:
        self.new_rotary = rotary
        return [swap_module(self.decoder, self.rotary_name, rotary)]

    def _check_unscaled(self, config: PreTrainedConfig, geometry: Geometry) -> None:
        unscaled = copy.deepcopy(config)
        unscaled.rope_parameters = self._with({"rope_type": "default", "rope_theta": geometry.theta})
        found = getattr(self._build(unscaled), self.buffer).double()
        expected = inverse_frequencies(geometry.theta, geometry.rotary_dim)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-5, atol=0):
            raise PatchError(
                f"the unscaled frequencies of {type(self.rotary).__name__} are not theta ** (-2 i / d) with theta={geometry.theta:g}, "
                f"d={geometry.rotary_dim}; a scaling has no meaning for them"
            )

    def _convention(self) -> str:
        """Whether the family's own rotation pairs halves or neighbours, found by rotating a random vector both ways."""
        apply = getattr(sys.modules[type(self.decoder).__module__], "apply_rotary_pos_emb", None)
        dim = 2 * getattr(self.rotary, self.buffer).shape[-1]
        angles = torch.arange(3.0)[:, None] * inverse_frequencies(100.0, dim).float()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 1, 3, dim, generator=generator)
        for convention in CONVENTIONS:
            table = torch.cat((angles, angles), -1) if convention == "half" else angles.repeat_interleave(2, -1)
            try:
                turned = apply(x, x, table.cos()[None], table.sin()[None])[0]  # type: ignore[misc]
            except Exception as error:
                raise PatchError(
                    f"the rotation of {type(self.model).__name__} cannot be taken over by the score seam ({error}); use a scheme of the "
                    "freq seam, e.g. cache='pinned' with a target_length"
                ) from error
            if torch.allclose(turned, rotate(x, angles.cos(), angles.sin(), convention), atol=1e-5):
                return convention
        raise PatchError(
            f"{type(self.model).__name__} pairs the rotated dimensions neither by halves nor by neighbours; the score seam cannot take its "
            "rotation over. Use a scheme of the freq seam, e.g. cache='pinned' with a target_length"
        )
