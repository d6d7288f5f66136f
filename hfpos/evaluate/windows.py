"""Which tokens the model reads together, and which of them are scored: pure arithmetic on token indices.

A *window* is one row that the model reads, at most L tokens for a context length L, a BOS token put in front included. Every scored token is
scored in exactly one window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


Bos = Literal["every-window", "first", "none"]


@dataclass(frozen=True)
class Window:
    """Tokens `begin` up to `end` of a document, of which those from `first_scored` on are scored.

    Attributes:
        has_bos: whether a BOS token is put in front.
        lengths: the context lengths it serves; of each, the first `length` tokens of the row (BOS included) are that length's window.
    """

    begin: int
    end: int
    first_scored: int
    has_bos: bool
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many tokens the model reads."""
        return self.end - self.begin + self.has_bos

    @property
    def offset(self) -> int:
        """Index in the row of the document's token 0; what a token's document index needs added."""
        return self.has_bos - self.begin


def truncated(tokens: int, lengths: list[int], bos: Bos, starts_with_bos: bool, every_length: bool) -> list[Window]:
    """The first L tokens of a document for every L it reaches; one window for all of them unless `every_length`.

    >>> truncated(100, [32, 64, 128], "none", False, every_length=False)
    [Window(begin=0, end=64, first_scored=1, has_bos=False, lengths=(32, 64))]
    """
    has_bos = bos != "none" and not starts_with_bos
    reached = [length for length in lengths if length <= tokens + has_bos]
    served = [(length,) for length in reached] if every_length else [tuple(reached)] if reached else []
    return [Window(0, each[-1] - has_bos, 1 - has_bos, has_bos, each) for each in served]


def sliding(tokens: int, length: int, stride: int, bos: Bos, starts_with_bos: bool) -> list[Window]:
    """Windows of `length` tokens (the last one may be shorter), each `stride` tokens further, and scored from where the last one ended.

    From the second window on, every scored token has at least `length - stride` tokens before it in its window. A stride of a whole
    window gives disjoint windows; a BOS in each of them takes the place of one token.

    >>> [(w.begin, w.end, w.first_scored) for w in sliding(10, 4, 2, "none", False)]
    [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    """
    has_bos = bos != "none" and not starts_with_bos
    if length > tokens + has_bos:
        return []
    windows = [Window(0, min(tokens, length - has_bos), 1 - has_bos, has_bos, (length,))]
    has_bos = bos == "every-window"
    room = length - has_bos
    while windows[-1].end < tokens:
        scored = windows[-1].end
        begin = scored - (room - min(stride, room))
        end = min(tokens, begin + room)
        # where each window starts afresh, the first token after a border has nothing before it, and cannot be scored
        first = scored if begin < scored or has_bos else scored + 1
        if first < end:
            windows.append(Window(begin, end, first, has_bos, (length,)))
        else:
            break
    return windows
