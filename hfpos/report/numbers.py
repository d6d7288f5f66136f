"""How numbers are written in reports."""

from __future__ import annotations

import math


def number(value: float, digits: int = 4) -> str:
    """`digits` significant digits, no exponent where a reader can do without, thousands parted by commas.

    >>> [number(value) for value in (0.03141, 3.14159, 20.0, 1234.5, 123456.7, 2.5e9, float("inf"))]
    ['0.03141', '3.142', '20.00', '1,234', '123,457', '2.5e+09', 'inf']
    """
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2g}"
    before_point = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{value:,.{max(0, digits - before_point)}f}"


def percent(value: float) -> str:
    """A relative change, with its sign.

    >>> percent(0.1094), percent(-0.443), percent(4475.2)
    ('+10.9 %', '-44.3 %', '+447,520 %')
    """
    return f"{100 * value:+,.{0 if value >= 10 else 1}f} %"


def share(value: float) -> str:
    """A share of a whole.

    >>> share(0.925), share(1), share(0.001)
    ('92 %', '100 %', '0.1 %')
    """
    return f"{100 * value:.0f} %" if value in {0, 1} or value >= 0.01 else f"{100 * value:.1g} %"


def plain(value: object) -> str:
    """A value from a JSON file in words, nested ones too.

    >>> plain({"torch": "2.11", "gpu": None, "sizes": [1, 2]})
    'torch 2.11, gpu none, sizes 1 2'
    """
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {plain(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(plain, value))
    return "none" if value is None else f"{value:,}" if type(value) is int else str(value)
