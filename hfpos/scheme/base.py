"""The base of all schemes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hfpos.scheme.errors import PatchError, did_you_mean


if TYPE_CHECKING:
    from hfpos.scheme.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Base of all schemes. Subclasses are frozen dataclasses whose fields are the paper's parameters.

    A field with `compare=False` is no parameter: it is a number of the model, for those who use the scheme without one.
    """

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    @property
    def seam(self) -> str:
        """Where the scheme reaches a model: `freq`, `score`, `bias`, `embed` or `none`."""
        raise TypeError(f"{type(self).__name__} does not say at which seam it acts")

    def check(self, geometry: Geometry) -> None:
        """Raise `PatchError` where the scheme cannot work on a model of this geometry."""

    def patched_length(self, geometry: Geometry) -> int | None:
        """The context length in tokens the patched model is meant for; None where the scheme does not set one."""
        return geometry.allowed_length

    @property
    def length_dependent(self) -> bool:
        """Whether a token's output depends on tokens behind it, through the total length of the call."""
        return False

    def parameters(self) -> dict[str, Any]:
        """The parameters as plain JSON values; `type(self)(**self.parameters())` equals `self`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.compare}

    @classmethod
    def create(cls, **parameters: Any) -> Scheme:
        """Build the scheme, turning an unknown parameter into a `PatchError` with a hint."""
        fields = {field.name for field in dataclasses.fields(cls)}
        for key in parameters:
            if key not in fields:
                known = f"{cls.name!r} takes no parameters" if not fields else did_you_mean(key, fields)
                raise PatchError(f"{cls.name!r} has no parameter {key!r}: {known}")
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and field.name not in parameters
        ]
        if missing:
            raise PatchError(
                f"{cls.name!r} needs {' and '.join(missing)}, which {'was' if len(missing) == 1 else 'were'} not given"
            )
        return cls(**parameters)

    def __str__(self) -> str:
        given = [
            f"{field.name}={_short(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(given)})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
