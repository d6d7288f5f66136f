"""What a model with rotary embeddings says of itself: where it rotates, and by which numbers."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hfpos.families._rotary_module import frequency_names
from hfpos.scheme import Geometry, PatchError


def text_rotaries(model: PreTrainedModel) -> list[tuple[Any, str, Any]]:
    """`(owner, name, module)` of every rotary module in the language model of `model`."""
    config = model.config.get_text_config(decoder=True)
    found = []
    for owner in model.modules():
        for name, module in owner.named_children():
            if frequency_names(module) and getattr(module, "config", config) is config:
                found.append((owner, name, module))
    return found


def scaled_type(parameters: dict[str, Any]) -> str | None:
    """The type of layer whose parameters are scaled where a config nests them by type: not the sliding ones. None if it does not."""
    nested = [key for key, value in parameters.items() if isinstance(value, dict)]
    if not nested:
        return None
    scaled = [key for key in nested if "sliding" not in key]
    return scaled[0] if len(scaled) == 1 else ""


def no_single_rotary(model: PreTrainedModel) -> str | None:
    """Why `model` has not one rotary module, with one set of frequencies to scale, for all its layers; None if it has."""
    found = text_rotaries(model)
    if not found:
        return "it has no rotary embedding"
    owner, _, rotary = found[0]
    places = sum(bool(frequency_names(module)) for module in owner.modules())
    if len(found) > 1 or places > 1 or not isinstance(owner, PreTrainedModel):
        return f"it computes rotary embeddings in {max(places, len(found))} places (in {type(owner).__name__} ...), not once for all layers"
    parameters = getattr(owner.config, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        return "its config has no rope_parameters"
    layer_type = scaled_type(parameters)
    if layer_type == "":
        return f"its config nests rope_parameters by {sorted(parameters)}; which of them to scale cannot be told"
    names = frequency_names(rotary)
    if (f"{layer_type}_inv_freq" if layer_type else "inv_freq") not in names or (
        layer_type is None and len(names) > 1
    ):
        return f"its rotary module keeps its frequencies as {names}"
    return None


def rotary_geometry(config: Any, parameters: dict[str, Any], rotary_dim: int, head_dim: int | None) -> Geometry:
    """The numbers of a model with rotary embeddings.

    Args:
        parameters: the rope parameters of its config, of layers of one type where it nests them.
        rotary_dim: how many dimensions of a head are rotated.
        head_dim: width of a head; unless given, what the config's `partial_rotary_factor` makes of `rotary_dim`.

    Raises:
        PatchError: a rope type that Transformers does not know, no theta, or lengths that contradict each other.
    """
    kind = parameters.get("rope_type", "default")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise PatchError(
            f"the config's rope_type {kind!r} is unknown to Transformers; expected one of "
            f"{', '.join(['default', *sorted(ROPE_INIT_FUNCTIONS)])}: correct config.rope_parameters"
        )
    theta = parameters.get("rope_theta")
    if not isinstance(theta, (int, float)):
        raise PatchError(
            f"the config's rope_parameters have no rope_theta: {parameters}; set it before the model is built"
        )
    allowed = getattr(config, "max_position_embeddings", None)
    stated = parameters.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if stated is not None and allowed is not None and stated > allowed:
        raise PatchError(
            f"the config states original_max_position_embeddings={stated} but max_position_embeddings={allowed}, which is shorter; "
            "correct one of them before the model is built"
        )
    problem = None
    if stated is None and parameters.get("factor", 1) != 1 and kind != "dynamic":
        problem = (
            f"the model is already scaled ({kind}, factor {parameters['factor']}) and its config does not state the length it "
            "was pretrained at"
        )
    return Geometry(
        heads=config.num_attention_heads,
        head_dim=head_dim or round(rotary_dim / parameters.get("partial_rotary_factor", 1.0)),
        rotary_dim=rotary_dim,
        theta=float(theta),
        trained_length=None if problem else stated or allowed,
        trained_length_stated=stated is not None,
        allowed_length=allowed,
        length_problem=problem,
    )
