"""Samples of one length to train on, from a mixture of sources of text."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfpos.data.mixture import Source, interleave, require_whole, shares
from hfpos.data.packing import assemble, check_packing
from hfpos.data.source_samples import SourceSamples
from hfpos.data.tokenized import tokenize_source
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What a seed is used for, so that no two draws are alike
_SOURCE, _MIXTURE = 0, 1


def training_set(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    packing: str = "documents",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    skip_bad: bool = False,
) -> TrainingSet:
    """Tokenise the sources once, to disk, and arrange their documents in samples of `length` tokens.

    The order depends on the sources, the arguments and the seed alone, not on the number of processes. Documents are shuffled
    before they are packed, samples of all sources are mixed evenly, and none holds text of two sources.

    Args:
        sources: one or more.
        tokenizer: the model's. Special tokens are not added, but for the end-of-text token (`eos_token_id`) behind every
            document where there is one ("documents" and "joined").
        length: tokens of a sample, 2 or more.
        packing: "documents": one after another, cut every `length` tokens, positions from 0 in each document, and in the rest of
            one that was cut; they do not attend to each other. "joined": the same without borders: plain positions, attention
            across documents. "blocks": each sample lies within one document, shorter rests are dropped.
        seed: of every draw, 0 or more.
        cache_dir: where tokenised text is kept, see `hfpos.data.tokenized.tokenize_source`.
        skip_bad: go on where a file or row cannot be read or is empty; `summary()` lists them. Without it that is an error.

    Raises:
        PatchError: an argument out of range, text that cannot be read, or too little of it for one sample.

    >>> import tempfile
    >>> from hfpos.data import train_tokenizer
    >>> tokenizer = train_tokenizer([], vocab_size=258)  # one token a byte; 1 is the end of text
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     data = training_set([Source(["abc"])], tokenizer, length=4, cache_dir=folder)
    ...     print(data.where(0), data[0])
    document 0, tokens 0 to 2 {'input_ids': tensor([66, 67, 68,  1]), 'labels': tensor([-100,   67,   68,    1]),
     'position_ids': tensor([0, 1, 2, 3])}
    """
    if isinstance(sources, (str, Source)) or not all(isinstance(source, Source) for source in sources) or not sources:
        raise PatchError(f"sources={sources!r}; expected a list of hfpos.data.Source, e.g. [Source('stdlib')]")
    require_whole("length", length, 2)
    require_whole("seed", seed, 0)
    check_packing(packing)
    texts = [tokenize_source(source, tokenizer, skip_bad=skip_bad, cache_dir=cache_dir) for source in sources]
    end_of_text = tokenizer.eos_token_id
    parts = [
        SourceSamples(source, text, length, packing, end_of_text) for source, text in zip(sources, texts, strict=True)
    ]
    return TrainingSet(parts, length, packing, seed)


class TrainingSet(torch.utils.data.Dataset):
    """The samples of one epoch, by number; made by `training_set`.

    It can be pickled, and holds no text: tokens are read from the disk as they are asked for.

    Attributes:
        length: tokens of a sample.
        packing: how they were made.
        seed: of the order.
    """

    def __init__(self, parts: Sequence[SourceSamples], length: int, packing: str, seed: int) -> None:
        self.length = length
        self.packing = packing
        self.seed = seed
        self._parts = parts
        counts = shares([part.own for part in parts], [part.weight for part in parts])
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            if not count:
                raise PatchError(
                    f"weight={part.weight} gives {part.text.source} none of the {sum(counts):,} samples; expected a larger "
                    "one, or leave the source out"
                )
            part.arrange(count, (seed, _SOURCE, number))
        self._source, self._turn = interleave(counts, [seed, _MIXTURE])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        part, turn = self._find(index)
        return assemble(part.pieces(turn), self.packing)

    def where(self, index: int) -> str:
        """Where a sample is from, for errors: "book.txt, tokens 4,096 to 8,191"; with several sources the source before it.

        Tokens are counted from 0. Of more than three pieces the first three are named, and how many there are beyond them.
        """
        part, turn = self._find(index)
        return f"{part.text.source}: {part.where(turn)}" if len(self._parts) > 1 else part.where(turn)

    def summary(self) -> dict[str, Any]:
        """What is trained on, ready for JSON: the arguments, totals, a SHA-256 of all token ids, and the same for each source.

        `tokens` counts the text, `samples` what an epoch has.
        """
        rows = [part.summary() for part in self._parts]
        return {
            "length": self.length,
            "packing": self.packing,
            "seed": self.seed,
            "documents": sum(row["documents"] for row in rows),
            "tokens": sum(row["tokens"] for row in rows),
            "documents_used": sum(row["documents_used"] for row in rows),
            "samples": len(self),
            "sha256": hashlib.sha256(" ".join(row["sha256"] for row in rows).encode()).hexdigest(),
            "sources": rows,
        }

    def _find(self, index: int) -> tuple[SourceSamples, int]:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        return self._parts[self._source[number]], int(self._turn[number])
