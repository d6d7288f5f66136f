"""The window arithmetic against its own promises: every token scored once, never with less context than said."""

import itertools

import pytest

from hfpos.evaluate.windows import sliding, truncated


@pytest.mark.parametrize("bos", ["none", "first", "every-window"])
@pytest.mark.parametrize("starts_with_bos", [False, True])
def test_sliding_scores_every_token_once_with_enough_context(bos, starts_with_bos):
    for tokens, length in itertools.product(range(2, 23), (2, 3, 5, 8, 16)):
        for stride in range(1, length + 1):
            windows = sliding(tokens, length, stride, bos, starts_with_bos)
            front = bos != "none" and not starts_with_bos
            if tokens + front < length:
                assert windows == []
                continue
            scored = [index for window in windows for index in range(window.first_scored, window.end)]
            assert scored == sorted(set(scored))
            disjoint = stride == length and bos != "every-window"
            unscored = set(range(tokens)) - set(scored)
            # the first token has nothing before it; nor has the first of each window that starts afresh without a BOS
            alone = {window.begin for window in windows if not window.has_bos} if disjoint else set() if front else {0}
            # one left over at the end of disjoint windows would be the first of its window
            assert unscored == alone | ({tokens - 1} if disjoint and windows[-1].end == tokens - 1 else set())
            for number, window in enumerate(windows):
                assert 1 <= window.tokens <= length
                context = window.first_scored + window.offset
                assert context >= (1 if number == 0 or disjoint else max(1, length - stride))
                assert window.has_bos == (front if number == 0 else bos == "every-window")


def test_a_stride_of_the_whole_window_is_disjoint():
    assert [(w.begin, w.end) for w in sliding(20, 8, 8, "none", False)] == [(0, 8), (8, 16), (16, 20)]
    assert [(w.begin, w.end) for w in sliding(20, 8, 8, "every-window", False)] == [(0, 7), (7, 14), (14, 20)]


def test_truncated_is_one_window_or_one_for_each_length():
    one = truncated(50, [8, 16, 64], "none", False, every_length=False)
    assert [(w.begin, w.end, w.lengths) for w in one] == [(0, 16, (8, 16))]
    each = truncated(50, [8, 16, 64], "first", False, every_length=True)
    assert [(w.tokens, w.end, w.first_scored, w.lengths) for w in each] == [(8, 7, 0, (8,)), (16, 15, 0, (16,))]
    assert truncated(7, [8], "none", False, every_length=False) == []
    assert truncated(7, [8], "first", False, every_length=False) != []
