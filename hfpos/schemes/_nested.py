"""Schemes inside schemes: what a user may write for one, and what is kept of it in a checkpoint."""

from __future__ import annotations

import ast
import re
from abc import abstractmethod
from typing import Any

from hfpos.scheme import Geometry, PatchError, Scheme


class Nested(Scheme):
    """Base of the schemes that are made of others."""

    @abstractmethod
    def distinct(self) -> list[Scheme]:
        """Every scheme that it is made of, once."""

    @property
    def learned(self) -> bool:
        """Whether one of them has weights that are trained with the model."""
        return any(getattr(scheme, "learned", False) for scheme in self.distinct())

    @property
    def length_dependent(self) -> bool:
        return any(scheme.length_dependent for scheme in self.distinct())

    def patched_length(self, geometry: Geometry) -> int | None:
        lengths = [scheme.patched_length(geometry) for scheme in self.distinct()]
        return max((length for length in lengths if length is not None), default=None)


def name_and_parameters(text: str) -> tuple[str, dict[str, Any]]:
    """A scheme as it is written in a command: its name and its parameters, both unchecked.

    >>> name_and_parameters("yarn(factor=4, truncate=False)")
    ('yarn', {'factor': 4, 'truncate': False})
    """
    matched = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", text.strip())
    if matched is None:
        raise PatchError(f"{text!r} is not a scheme; expected a name, or name(parameter=value, ...)")
    name, inside = matched.groups()
    try:
        call = ast.parse(f"f({inside or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("expected name=value")
        return name, {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError) as error:
        problem = error.msg if isinstance(error, SyntaxError) else error
        raise PatchError(
            f"{text!r}: {problem}; expected parameters as Python writes them, e.g. dynamic(cache='pinned')"
        ) from error


def resolve(value: Any, owner: str) -> Scheme | None:
    """The scheme that `value` stands for; None stays None, which is the model's own positions.

    Args:
        owner: the name of the scheme that it is part of.
        value: a scheme object, a name or text such as `"yarn(factor=4)"`, what `as_json` made of one, or None.

    Raises:
        PatchError: an unknown scheme or parameter, or something else.

    >>> resolve("nope", "per_layer") == resolve({"scheme": "nope", "parameters": {}}, "per_layer")
    True
    """
    from hfpos.schemes import REGISTRY  # which imports this file

    if value is None or isinstance(value, Scheme):
        return value
    if isinstance(value, str):
        name, parameters = name_and_parameters(value)
    elif isinstance(value, dict) and value.keys() == {"scheme", "parameters"}:
        name, parameters = value["scheme"], value["parameters"]
    else:
        raise PatchError(
            f"{owner}: {value!r} is not a scheme; expected a name, text such as 'yarn(factor=4)', a scheme object, or None for the model's own positions"
        )
    return REGISTRY[name].create(**parameters)


def as_json(scheme: Scheme | None) -> dict[str, Any] | None:
    """The scheme as plain JSON values, from which `resolve` makes an equal one."""
    return None if scheme is None else {"scheme": scheme.name, "parameters": scheme.parameters()}
