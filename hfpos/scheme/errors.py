"""The one exception, `PatchError`, and the checks of numbers that raise it."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Iterable


class PatchError(RuntimeError):
    """The one exception of hfpos: says what was asked, what was found, what was expected and how to mend it."""

    __module__ = "hfpos.scheme"  # by which tracebacks name it


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint for a misspelt `word`: the nearest of `choices`, then all of them.

    >>> did_you_mean("yarm", ["yarn", "ntk"])
    "did you mean 'yarn'? Available: ntk, yarn"
    """
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Available: {', '.join(names)}"


def require_number(scheme: str, name: str, value: Any, *, least: float, strictly: bool = False) -> None:
    """Raise `PatchError` unless `value` is a finite real number `>= least` (`> least` if `strictly`)."""
    sign = ">" if strictly else ">="
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < least or (strictly and value == least):
        raise PatchError(f"{scheme}: {name}={value!r} is not usable; expected a finite number {sign} {least:g}")


def require_length(scheme: str, name: str, value: Any) -> None:
    """Raise `PatchError` unless `value` is a whole number of tokens >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PatchError(f"{scheme}: {name}={value!r} is not usable; expected a whole number of tokens >= 1")


def require_count(scheme: str, name: str, value: Any, least: int = 1) -> None:
    """Raise `PatchError` unless `value` is a whole number `>= least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PatchError(f"{scheme}: {name}={value!r} is not usable; expected a whole number >= {least}")


def require_flag(scheme: str, name: str, value: Any) -> None:
    """Raise `PatchError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise PatchError(f"{scheme}: {name}={value!r} is not usable; expected True or False")


def require_choice(scheme: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `PatchError` unless `value` is one of `choices`."""
    if value not in choices:
        raise PatchError(f"{scheme}: {name}={value!r} is unknown: {did_you_mean(str(value), choices)}")
