"""A scheme for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfpos.scheme import PatchError, Scheme
from hfpos.schemes._nested import Nested, as_json, resolve


SEAMS = ("freq", "score", "bias", "none")  # what acts in each layer for itself


@dataclass(frozen=True, kw_only=True)
class PerLayer(Nested):
    """A scheme for each layer, where None keeps the layer as the model has it.

    `hfpos.patch(model, "nope", layers=[3, 7])` writes the list for you. Rotary layers between layers without positions are the
    layout of iRoPE (Llama 4) and of SmolLM3; `nope` in ever more layers, with a little training after each step, is how positions
    are dropped from a trained model.

    Papers: RoPE to NoPE and Back Again, arXiv 2501.18795; dropping positions after the pretraining (DroPE), arXiv 2512.12167.

    Args:
        schemes: one entry for each layer: a scheme object, text such as `"yarn(factor=4)"`, or None. Or a dict from types of layers
            (`config.layer_types`) to such entries; types that are not named keep what they have.

    >>> PerLayer(schemes=["rope", None, "nope"]).of_layers(["full_attention"] * 3)[2]
    Nope()
    """

    name = "per_layer"
    paper = "arXiv 2501.18795"
    summary = "a scheme of its own for each layer, or for each type of layer"

    schemes: Sequence[Any] | Mapping[str, Any]

    def __post_init__(self) -> None:
        given = self.schemes
        if isinstance(given, str) or not isinstance(given, (Sequence, Mapping)):
            raise PatchError(
                f"per_layer: schemes={given!r} is not usable; expected a list with one scheme (or None) for each layer, or a dict from types of "
                "layers to schemes"
            )
        if isinstance(given, Mapping):
            object.__setattr__(self, "schemes", {kind: resolve(value, self.name) for kind, value in given.items()})
        else:
            object.__setattr__(self, "schemes", [resolve(value, self.name) for value in given])
        if not self.distinct():
            raise PatchError("per_layer: no layer is given a scheme, so nothing would change")
        for scheme in self.distinct():
            if scheme.seam not in SEAMS or hasattr(scheme, "resize"):
                raise PatchError(
                    f"per_layer: {scheme.name!r} acts on the embeddings, before any layer, so single layers cannot have it; expected schemes "
                    f"of the seams {', '.join(SEAMS)}"
                )

    @property
    def seam(self) -> str:
        return "layers"

    @property
    def pins_prompt(self) -> bool:
        """Whether some layer keeps the frequencies of the prompt's length."""
        return any(getattr(scheme, "pins_prompt", False) for scheme in self.distinct())

    def distinct(self) -> list[Scheme]:
        """Every scheme that some layer is given, once."""
        found: list[Scheme] = []
        for scheme in self.schemes.values() if isinstance(self.schemes, Mapping) else self.schemes:
            if scheme is not None and scheme not in found:
                found.append(scheme)
        return found

    def of_layers(self, layer_types: list[str]) -> list[Scheme | None]:
        """The scheme of each layer, None where it keeps what it has.

        Args:
            layer_types: the type of each layer.

        Raises:
            PatchError: the list is not as long as the model has layers, or a type is not among them.
        """
        if isinstance(self.schemes, Mapping):
            unknown = sorted(set(self.schemes) - set(layer_types))
            if unknown:
                raise PatchError(
                    f"per_layer: the model has no layers of type {', '.join(map(repr, unknown))}; its types are "
                    f"{', '.join(map(repr, sorted(set(layer_types))))}"
                )
            return [self.schemes.get(kind) for kind in layer_types]
        if len(self.schemes) != len(layer_types):
            raise PatchError(
                f"per_layer: {len(self.schemes)} schemes were given, the model has {len(layer_types)} layers; give one for each, None for "
                "those that stay as they are"
            )
        return list(self.schemes)

    def parameters(self) -> dict[str, Any]:
        if isinstance(self.schemes, Mapping):
            return {"schemes": {kind: as_json(scheme) for kind, scheme in self.schemes.items()}}
        return {"schemes": [as_json(scheme) for scheme in self.schemes]}

    def __str__(self) -> str:
        return f"per_layer({', '.join(map(str, self.distinct()))})"
