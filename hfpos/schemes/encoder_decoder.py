"""A scheme for the encoder and another for the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hfpos.scheme import PatchError, Scheme
from hfpos.schemes._nested import Nested, as_json, resolve


@dataclass(frozen=True, kw_only=True)
class EncoderDecoder(Nested):
    """A scheme of its own for each stack of an encoder-decoder, where None keeps the stack as the model has it.

    A scheme that is given by itself, as in `hfpos.patch(model, "alibi")`, goes into both stacks. In either case it is bidirectional
    in the encoder and causal in the decoder, and attention from the decoder to the encoder stays as it is: none of the families has
    positions there.

    Args:
        encoder: of the encoder: a scheme object, text such as `"alibi(factor=2)"`, or None.
        decoder: of the decoder.

    >>> str(EncoderDecoder(encoder="rope", decoder="alibi(factor=2)"))
    'encoder_decoder(encoder=rope(), decoder=alibi(factor=2))'
    """

    name = "encoder_decoder"
    paper = "arXiv 1910.10683"
    summary = "a scheme of its own for the encoder and for the decoder"

    encoder: Any = None
    decoder: Any = None

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder"):
            scheme = resolve(getattr(self, name), self.name)
            object.__setattr__(self, name, scheme)
            if isinstance(scheme, EncoderDecoder):
                raise PatchError(f"encoder_decoder: {name}={scheme} is a pair itself; give a scheme of one stack")
        if not self.distinct():
            raise PatchError(
                "encoder_decoder: neither encoder= nor decoder= was given, so nothing would change; give at least one, e.g. decoder='alibi'"
            )

    @property
    def seam(self) -> str:
        return "stacks"

    def distinct(self) -> list[Scheme]:
        """The schemes that were given."""
        return [scheme for scheme in (self.encoder, self.decoder) if scheme is not None]

    def of_stacks(self, stacks: list[str]) -> dict[str, Scheme | None]:
        """The scheme of each of the model's `stacks`, None where it keeps what it has. Raises `PatchError` for one that it has not."""
        given: dict[str, Scheme | None] = {"encoder": self.encoder, "decoder": self.decoder}
        for name, scheme in given.items():
            if scheme is not None and name not in stacks:
                raise PatchError(
                    f"encoder_decoder: {name}={scheme} was given, and the model has only its {' and '.join(stacks)}; leave {name} out"
                )
        return {name: given[name] for name in stacks}

    def parameters(self) -> dict[str, Any]:
        return {"encoder": as_json(self.encoder), "decoder": as_json(self.decoder)}

    def __str__(self) -> str:
        given = [f"{name}={getattr(self, name)}" for name in ("encoder", "decoder") if getattr(self, name) is not None]
        return f"{self.name}({', '.join(given)})"
