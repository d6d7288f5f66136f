"""Samples of one length out of documents of any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hfpos.scheme import PatchError, did_you_mean


PACKINGS = ("blocks", "documents", "joined")
IGNORED = -100  # the label that Transformers' losses leave out


class Piece(NamedTuple):
    """Tokens `start` up to but not including `stop` of one document; the one behind its last token is the end-of-text token."""

    document: int
    start: int
    stop: int


class Layout:
    """Documents laid one after another in a row, which is cut into samples of `length` tokens; a shorter rest is dropped.

    Args:
        documents: (entries,) which document each entry is, in the order of the row.
        sizes: (entries,) how many of its tokens are laid down, from its first.
        length: tokens of a sample.

    >>> layout = Layout(np.array([7, 3]), np.array([5, 4]), length=4)
    >>> layout.samples, layout.pieces(1)
    (2, [Piece(document=7, start=4, stop=5), Piece(document=3, start=0, stop=3)])
    """

    def __init__(self, documents: np.ndarray, sizes: np.ndarray, length: int) -> None:
        self.documents = documents
        self.ends = np.cumsum(sizes)
        self.length = length

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return int(self.ends[-1]) // self.length if len(self.ends) else 0

    def pieces(self, sample: int) -> list[Piece]:
        """What a sample is made of, in order."""
        begin, end = sample * self.length, (sample + 1) * self.length
        first, last = np.searchsorted(self.ends, [begin, end - 1], side="right")
        found = []
        for entry in range(first, last + 1):
            start = int(self.ends[entry - 1]) if entry else 0
            stop = int(self.ends[entry])
            found.append(Piece(int(self.documents[entry]), max(begin, start) - start, min(end, stop) - start))
        return found


def check_packing(packing: str) -> None:
    """Raise PatchError unless `packing` is one of `PACKINGS`."""
    if packing not in PACKINGS:
        raise PatchError(f"unknown packing {packing!r}; {did_you_mean(str(packing), PACKINGS)}")


def laid_sizes(lengths: np.ndarray, packing: str, length: int, end_of_text: bool) -> np.ndarray:
    """How many tokens of each document are laid down: all and the end-of-text token, or for "blocks" as many whole samples as fit.

    >>> laid_sizes(np.array([3, 9]), "documents", 4, end_of_text=True), laid_sizes(np.array([3, 9]), "blocks", 4, True)
    (array([ 4, 10]), array([0, 8]))
    """
    return lengths // length * length if packing == "blocks" else lengths + end_of_text


def assemble(pieces: Sequence[np.ndarray], packing: str) -> dict[str, torch.Tensor]:
    """One sample out of the token ids of its pieces, (tokens,) each: `input_ids` and `labels`, (length,) int64.

    With "documents" also `position_ids`, (length,) int64, from 0 in each piece: Transformers keeps pieces apart by them where
    there is neither an attention mask nor a cache. The first token of a piece has nothing before it to be predicted from: its
    label is -100. Labels are not shifted, models do that.

    >>> assemble([np.array([5, 6]), np.array([7])], "documents")["labels"]
    tensor([-100,    6, -100])
    """
    ids = torch.from_numpy(np.concatenate(pieces))
    sample = {"input_ids": ids, "labels": ids.clone()}
    if packing == "documents":
        sample["position_ids"] = torch.cat([torch.arange(len(piece)) for piece in pieces])
        sample["labels"][sample["position_ids"] == 0] = IGNORED
    return sample
