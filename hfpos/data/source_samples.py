"""The samples that one source of a mixture gives."""

from __future__ import annotations

from typing import Any

import numpy as np

from hfpos.data.mixture import Source, sample_order
from hfpos.data.packing import Layout, laid_sizes
from hfpos.data.shards import Shards
from hfpos.scheme import PatchError


_PIECES_NAMED = 3
# What a seed is used for, so that no two draws are alike
_DOCUMENTS, _SAMPLES = 0, 1


class SourceSamples:
    """The documents of one source, chosen, repeated where they are long, and arranged in samples.

    Args:
        source: says which documents are chosen.
        text: its tokens.
        length: tokens of a sample.
        packing: one of `hfpos.data.packing.PACKINGS`.
        end_of_text: id of the token behind every document, None for none.

    Attributes:
        own: how many samples there are if each is seen once. `arrange` them before any is asked for.

    Raises:
        PatchError: not enough text for one sample.
    """

    def __init__(self, source: Source, text: Shards, length: int, packing: str, end_of_text: int | None) -> None:
        self.weight = source.weight  # not the source: it may be a list of texts, and this is sent to other processes
        self.text = text
        self.length = length
        self.end_of_text = end_of_text
        least = max(source.min_tokens, length if packing == "blocks" else 0)
        self._chosen = np.flatnonzero(text.lengths >= least)
        if not len(self._chosen):
            longest = int(text.lengths.argmax())
            raise PatchError(
                f"no document of {text.source} has {least:,} tokens, as "
                f"{'min_tokens' if least == source.min_tokens else 'a sample within one document'} needs; the longest, "
                f"{text.name(longest)}, has {text.lengths[longest]:,}: give longer text, or a smaller number"
            )
        times = np.ones(len(self._chosen), dtype=np.int64)
        if source.long_tokens is not None:
            times[text.lengths[self._chosen] >= source.long_tokens] = source.long_times
        self._entries = np.repeat(self._chosen, times)
        self._sizes = laid_sizes(text.lengths[self._entries], packing, length, end_of_text is not None)
        self.own = int(self._sizes.sum()) // length
        if not self.own:
            raise PatchError(
                f"{text.source} has {self._sizes.sum():,} tokens to train on, fewer than one sample of {length:,}; give more text, "
                "or a smaller length"
            )

    def arrange(self, wanted: int, seed: tuple[int, ...]) -> None:
        """Shuffle the documents, lay them in a row, and shuffle the samples; anew for every time that all are seen.

        Args:
            wanted: samples of an epoch: more than `own` repeats all of them, fewer draws a part.
            seed: numbers, of the draws.
        """
        self.wanted = wanted
        rounds = range(-(-wanted // self.own))
        entries = len(self._entries)
        order = np.concatenate(
            [np.random.default_rng([*seed, _DOCUMENTS, turn]).permutation(entries) for turn in rounds]
        )
        self._layout = Layout(self._entries[order], self._sizes[order], self.length)
        self._order = sample_order(self.own, wanted, [*seed, _SAMPLES])

    def pieces(self, turn: int) -> list[np.ndarray]:
        """The token ids of sample `turn` of the epoch, (tokens,) for each piece of a document."""
        found = []
        for document, start, stop in self._layout.pieces(int(self._order[turn])):
            size = int(self.text.lengths[document])
            ids = self.text.tokens(document, start, min(stop, size)) if start < size else np.array([], dtype=np.int64)
            end = [self.end_of_text] if stop > size else []
            found.append(np.concatenate([ids, np.array(end, dtype=np.int64)]))
        return found

    def where(self, turn: int) -> str:
        """The documents of sample `turn` of the epoch and which of their tokens, counted from 0; the first three pieces."""
        pieces = self._layout.pieces(int(self._order[turn]))
        named = []
        for document, start, stop in pieces[:_PIECES_NAMED]:
            last = min(stop, int(self.text.lengths[document])) - 1
            place = f"tokens {start:,} to {last:,}" if start <= last else "end of text"
            named.append(f"{self.text.name(document)}, {place}")
        if len(pieces) > _PIECES_NAMED:
            named.append(f"and {len(pieces) - _PIECES_NAMED:,} more")
        return "; ".join(named)

    def summary(self) -> dict[str, Any]:
        """Documents, tokens and samples of this source, what was skipped, and a SHA-256 of the token ids; ready for JSON."""
        return {
            "source": self.text.source,
            "weight": self.weight,
            "documents": len(self.text.lengths),
            "tokens": int(self.text.lengths.sum()),
            "documents_used": len(self._chosen),
            "samples_of_text": self.own,
            "samples": self.wanted,
            "skipped": [{"document": name, "reason": reason} for name, reason in self.text.skipped],
            "sha256": self.text.sha256,
        }
