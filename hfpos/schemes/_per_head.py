"""Numbers of which every head has one of its own, as users give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hfpos.scheme import PatchError, require_number


def numbers_of_heads(scheme: str, name: str, given: Any, *, strictly: bool = False) -> list[float]:
    """The parameter `name` of a scheme as plain numbers.

    Args:
        given: a list, tuple, array or tensor of numbers >= 0 (> 0 if `strictly`).

    Raises:
        PatchError: it is something else.

    >>> numbers_of_heads("alibi", "slopes", (1, 0.5))
    [1.0, 0.5]
    """
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise PatchError(f"{scheme}: {name}={given!r} is not usable; expected a list of numbers, one for each head")
    numbers = [value.item() if hasattr(value, "item") else value for value in values]
    for number in numbers:
        require_number(scheme, name, number, least=0, strictly=strictly)
    return [float(number) for number in numbers]


def check_heads(scheme: str, name: str, numbers: Sequence[float], heads: int) -> None:
    """Raise `PatchError` unless there are as many `numbers` as `heads`."""
    if len(numbers) != heads:
        raise PatchError(
            f"{scheme}: {len(numbers)} values of {name} were given, the model has {heads} attention heads; give one for each"
        )
