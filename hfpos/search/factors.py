"""Candidates of the search: one divisor for each frequency, none below 1 and none smaller than the one before it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import accumulate

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry
from hfpos.schemes import REGISTRY


Factors = tuple[float, ...]  # rotary_dim / 2 divisors, the fastest frequency's first

START_SCHEMES = {"pi": "linear", "ntk": "ntk", "yarn": "yarn"}
STEPS = 100  # the grid that divisors are drawn from: so many points from each whole number to the next
HEADROOM = 1.25  # the largest divisor drawn, as a multiple of target / original length


def starts(geometry: Geometry, original_length: int, target_length: int) -> dict[str, Factors]:
    """The frequencies of PI, NTK and YaRN for `target_length` tokens, as divisors of the unscaled ones.

    >>> model = Geometry(heads=8, head_dim=6, rotary_dim=6, theta=1e4, trained_length=512, allowed_length=512)
    >>> starts(model, 512, 2048)
    {'pi': (4.0, 4.0, 4.0), 'ntk': (1.0, 2.0, 4.0), 'yarn': (1.0, 1.6, 4.0)}
    """
    unscaled = inverse_frequencies(geometry.theta, geometry.rotary_dim)
    found = {}
    for label, name in START_SCHEMES.items():
        scheme = REGISTRY[name].create(target_length=target_length, original_length=original_length)
        inv_freq, _ = scheme.frequencies(geometry)  # type: ignore[attr-defined]
        # a division of float64 is off in its last digits, which would put 0.999... before 1
        found[label] = tuple(accumulate((round(divisor, 9) for divisor in (unscaled / inv_freq).tolist()), max))
    return found


def mutated(factors: Sequence[float], largest: float, probability: float, draw: random.Random) -> Factors:
    """A copy of which each divisor is drawn anew with `probability`: any point of the grid between its two neighbours.

    Args:
        factors: the divisors, none smaller than the one before it.
        largest: how far the last of them may go; the first may go down to 1.
        probability: from 0 to 1.
        draw: where chance comes from.
    """
    # before the first and behind the last
    values = [1.0, *factors, max(largest, factors[-1])]
    for index in range(1, len(values) - 1):
        if draw.random() < probability:
            # without the rounding 2.3 x 100 is 229.99...
            low = math.ceil(round(values[index - 1] * STEPS, 6))
            high = math.floor(round(values[index + 1] * STEPS, 6))
            if low <= high:
                values[index] = draw.randint(low, high) / STEPS
    return tuple(values[1:-1])


def crossed(one: Sequence[float], other: Sequence[float], draw: random.Random) -> Factors:
    """Each divisor from one of two candidates, by chance; then put in order, so that none is smaller than the one before it."""
    return tuple(sorted(draw.choice(pair) for pair in zip(one, other, strict=True)))
