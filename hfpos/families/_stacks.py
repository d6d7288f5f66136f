"""Encoder-decoders: each stack is patched as a model of its own, and the two plans become one."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from hfpos.attention.fixed_rotary import FixedRotation
from hfpos.configuration import mark_adapters, own_copy
from hfpos.families._family import Family
from hfpos.plan import Hook, Plan, set_attribute
from hfpos.scheme import Geometry, PatchError, Scheme
from hfpos.schemes.encoder_decoder import EncoderDecoder


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

    from hfpos.plan import Edit
    from hfpos.scheme import Rope


class Stack(Family):
    """Base of the families of single stacks, which no model is by itself.

    Args:
        model: the stack.
        family: the name of the family that it is part of, for messages.
    """

    def __init__(self, model: PreTrainedModel, family: str) -> None:
        super().__init__(model)
        self.name = family  # type: ignore[misc]

    @classmethod
    def refuses(cls, model: PreTrainedModel) -> str | None:
        return "it is part of a model"

    def cross_attention(self) -> list[Any]:
        """The attention modules whose keys come from the other stack."""
        return []

    def rotary_edits(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> tuple[list[Edit], bool, dict]:
        return self.positions_off(config), False, {"seam": FixedRotation(*scheme.frequencies(geometry))}

    def layer_edits(self, hook: Any) -> list[Edit]:
        return [set_attribute(module, "is_cross_attention", True) for module in self.cross_attention()]

    def _mark(self, scheme: Scheme, config: Any, stock: bool) -> None:
        """Nothing: the config of the whole model is what is saved."""


class Stacks(Family):
    """Base of the families of encoder-decoders, and of the encoders and decoders among them that stand alone."""

    seams = (*Family.seams, "stacks")

    @abstractmethod
    def stacks(self) -> dict[str, Stack]:
        """The family of each stack: `encoder`, `decoder`, or one of them."""

    def schemes(self, scheme: Scheme) -> dict[str, Scheme | None]:
        """The scheme of each stack."""
        names = list(self.stacks())
        return scheme.of_stacks(names) if isinstance(scheme, EncoderDecoder) else dict.fromkeys(names, scheme)

    def plan(self, scheme: Scheme, root: nn.Module, tokenizer: Any = None, backend: str = "auto") -> Plan:
        whole, _, copied = own_copy(root, self.model.config, self.model.config)
        length = scheme.patched_length(self.geometry())
        edits: list[Edit] = [*copied, *self._length_edits(length, whole)]
        schemes = self.schemes(scheme)
        for name, stack in self.stacks().items():
            wanted = schemes[name]
            if wanted is None:
                continue
            try:
                edits += stack.plan(wanted, stack.model, backend=backend).edits
            except PatchError as error:
                if len(schemes) == 1:
                    raise
                raise PatchError(f"{name}: {error}") from error
        edits.append(Hook(self.model, "register_state_dict_pre_hook", mark_adapters))
        edits += self._tokenizer_edits(tokenizer, length)
        self._mark(scheme, whole, stock=False)
        return Plan(tuple(edits))

    def is_unchanged(self, scheme: Scheme, geometry: Geometry) -> bool:
        schemes = self.schemes(scheme)
        return all(
            wanted is None or stack.is_unchanged(wanted, geometry)
            for stack, wanted in ((stack, schemes[name]) for name, stack in self.stacks().items())
        )

    def geometry(self) -> Geometry:
        return next(reversed(self.stacks().values())).geometry()

    def probe_positions(self, geometry: Geometry) -> None:
        return None

    def positions_off(self, config: PreTrainedConfig) -> list[Edit]:
        raise TypeError("each stack switches its own positions off")

    def rotary_edits(self, scheme: Rope, geometry: Geometry, config: Any, whole: Any) -> tuple[list[Edit], bool, dict]:
        raise TypeError("each stack is rotated by itself")
