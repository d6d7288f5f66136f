"""Sources of a mixture: what is refused, how many samples each gives, and in what order they come."""

from collections import Counter

import numpy as np
import pytest

from hfpos import PatchError
from hfpos.data import Source
from hfpos.data.mixture import interleave, sample_order, shares


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 0}, "source text.txt: weight=0; expected a number above 0"),
        ({"weight": -1.5}, r"weight=-1\.5"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"weight": float("inf")}, "weight=inf"),
        ({"weight": "2"}, "weight='2'"),
        ({"weight": True}, "weight=True"),
        ({"min_tokens": -1}, "min_tokens=-1; expected a whole number of at least 0"),
        ({"min_tokens": None}, "min_tokens=None"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"long_tokens": 1.5}, r"long_tokens=1\.5"),
        ({"long_times": 0, "long_tokens": 5}, "long_times=0"),
        ({"long_times": 2}, "long_times=2 needs long_tokens"),
    ],
)
def test_errors_of_a_source(options, message):
    with pytest.raises(PatchError, match=message):
        Source("text.txt", **options)


@pytest.mark.parametrize(
    ("own", "weights", "expected"),
    [
        ([10, 30], [None, None], [10, 30]),
        ([10, 30], [1, 1], [20, 20]),
        ([10, 30, 5], [1, 1, None], [20, 20, 5]),
        ([10], [0.3], [10]),
        ([1, 1, 1], [1, 1, 7], [0, 0, 3]),
        ([7, 7, 7], [1, 1, 1], [7, 7, 7]),
        ([50, 50], [0.7, 0.3], [70, 30]),
    ],
)
def test_shares(own, weights, expected):
    assert shares(own, weights) == expected
    assert sum(expected) == sum(own)


def test_interleaving_is_even():
    source, turn = interleave([100, 300, 1], [3])
    assert Counter(source.tolist()) == {0: 100, 1: 300, 2: 1}
    for number, count in enumerate([100, 300, 1]):
        assert turn[source == number].tolist() == list(range(count))
    first = np.cumsum(source == 0)
    assert np.abs(first - np.arange(1, 402) * 100 / 401).max() < 2.5
    assert sample_order(5, 12, [0]).tolist() != sample_order(5, 12, [1]).tolist()
    assert sorted(sample_order(5, 10, [0]).tolist()) == list(range(10))
