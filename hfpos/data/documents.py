"""Documents for evaluation: text from anywhere, tokenised, cut and filtered as asked, with a record of what was done."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hfpos.data.sources import describe_source, read_source
from hfpos.data.token_cache import tokenize_cached
from hfpos.evaluate.result import Skipped
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedDocument:
    """The token ids of one text.

    Attributes:
        name: where it is from.
        ids: (tokens,) int64.
        token_bytes: (tokens,) int64, how many UTF-8 bytes of the text each token stands for; None where the tokenizer does not
            tell. Over a whole text they sum to all its bytes.
    """

    name: str
    ids: torch.Tensor
    token_bytes: torch.Tensor | None = None

    def cut(self, start: int, stop: int, name: str | None = None) -> TokenizedDocument:
        """The tokens from `start` up to but not including `stop`."""
        size = None if self.token_bytes is None else self.token_bytes[start:stop]
        return TokenizedDocument(name or self.name, self.ids[start:stop], size)


@dataclass(frozen=True)
class DocumentSet:
    """What an evaluation runs on.

    Attributes:
        documents: in the order of the source.
        source: where the text came from.
        sha256: over the token ids of all documents, in order, with their borders.
        skipped: what was left out, and why.
        preparation: the arguments of `load_documents` that were not at their defaults.
    """

    documents: list[TokenizedDocument]
    source: str
    sha256: str
    skipped: tuple[Skipped, ...]
    preparation: dict[str, Any]


def load_documents(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column: str = "text",
    split: str | None = None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    block_tokens: int | None = None,
    max_documents: int | None = None,
    seed: int | None = None,
    skip_bad: bool = False,
    cache_dir: str | Path | None = None,
) -> DocumentSet:
    """Read text, tokenise it without special tokens, cut and filter it.

    The steps are taken in the order of the arguments. Tokenised text is kept on disk before any of them, so that another
    length does not tokenise again.

    Args:
        source: a text file, .jsonl, .jsonl.gz or .parquet, or a folder of these; "stdlib" for Python's standard library; a `datasets`
            object, one of its columns, or a name that `datasets.load_dataset` takes, its configuration behind a colon; or a list of strings.
        tokenizer: the model's.
        text_column: the field that holds the text, where `source` has rows.
        split: of a dataset that has several; of "stdlib" `train` or `held_out`, which share no file.
        min_tokens: shorter documents are left out, and listed as skipped.
        max_tokens: only the first so many tokens of each document are kept.
        block_tokens: cut each document into pieces of exactly so many tokens; a shorter rest is dropped.
        max_documents: only so many documents (or pieces): the first ones, or with `seed` ones drawn at random.
        seed: of that draw. The order stays that of the source.
        skip_bad: go on where a file or row cannot be read or is empty, and list it as skipped. Without it that is an error.
        cache_dir: see `hfpos.data.token_cache.tokenize_cached`; it changes no result and is not in the record.

    Raises:
        PatchError: text that cannot be read, no tokenizer, or nothing left.
    """
    given: dict[str, Any] = {
        "text_column": text_column,
        "split": split,
        "min_tokens": min_tokens,
        "max_tokens": max_tokens,
        "block_tokens": block_tokens,
        "max_documents": max_documents,
        "seed": seed,
        "skip_bad": skip_bad,
    }
    _check_numbers(given)
    name = describe_source(source)
    whole, skipped = _read(source, name, tokenizer, text_column, split, skip_bad, cache_dir)
    documents = _cut(whole, skipped, min_tokens, max_tokens, block_tokens)
    if not documents:
        longest = max(whole, key=lambda document: len(document.ids))
        raise PatchError(
            f"no document of {name} is long enough for min_tokens={min_tokens}, block_tokens={block_tokens}, "
            f"max_tokens={max_tokens}; the longest, {longest.name}, has {len(longest.ids)} tokens"
        )
    if max_documents is not None and len(documents) > max_documents:
        indices = range(len(documents))
        chosen = indices[:max_documents] if seed is None else random.Random(seed).sample(indices, max_documents)
        documents = [documents[index] for index in sorted(chosen)]
    defaults = {name: option.default for name, option in inspect.signature(load_documents).parameters.items()}
    preparation = {key: value for key, value in given.items() if value != defaults[key]}
    return DocumentSet(documents, name, digest(documents), tuple(skipped), preparation)


def _read(
    source: Any,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str,
    split: str | None,
    skip_bad: bool,
    cache_dir: str | Path | None,
) -> tuple[list[TokenizedDocument], list[Skipped]]:
    """All documents whole, and the bad ones."""
    names: list[str] = []
    texts: list[str] = []
    bad: list[tuple[str, PatchError]] = []

    def refuse(document: str, error: PatchError) -> None:
        if not skip_bad:
            raise error
        bad.append((document, error))

    for document, text in read_source(source, text_column, split):
        if isinstance(text, PatchError):
            refuse(document, text)
        else:
            names.append(document)
            texts.append(text)
    tokens = tokenize_cached(texts, tokenizer, cache_dir) if texts else []
    found = []
    for document, (ids, size) in zip(names, tokens, strict=True):
        if len(ids):
            found.append(TokenizedDocument(document, ids, size))
        else:
            refuse(
                document, PatchError(f"{document} has no tokens: the tokenizer drops all of its text; leave it out")
            )
    if not found and bad:
        raise PatchError(f"none of the {len(bad)} documents of {name} can be used; the first: {bad[0][1]}")
    if not found:
        raise PatchError(f"no text in {name}; expected at least one non-empty document")
    return found, [Skipped(document, str(error)) for document, error in bad]


def _cut(
    whole: Sequence[TokenizedDocument],
    skipped: list[Skipped],
    min_tokens: int,
    max_tokens: int | None,
    block_tokens: int | None,
) -> list[TokenizedDocument]:
    documents = []
    for document in whole:
        size = len(document.ids)
        if size < min_tokens:
            skipped.append(Skipped(document.name, f"{size} tokens, fewer than min_tokens={min_tokens}"))
            continue
        kept = size if max_tokens is None else min(size, max_tokens)
        if block_tokens is None:
            documents.append(document.cut(0, kept))
        elif kept < block_tokens:
            skipped.append(Skipped(document.name, f"{kept} tokens, fewer than block_tokens={block_tokens}"))
        else:
            documents += [
                document.cut(block * block_tokens, (block + 1) * block_tokens, f"{document.name}[{block}]")
                for block in range(kept // block_tokens)
            ]
    return documents


def _check_numbers(given: dict[str, Any]) -> None:
    least = {"min_tokens": 0, "max_tokens": 1, "block_tokens": 1, "max_documents": 1}
    for name, smallest in least.items():
        value = given[name]
        if value is None and name != "min_tokens":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise PatchError(f"{name}={value!r}: expected a whole number of at least {smallest}")
    if given["seed"] is not None and given["max_documents"] is None:
        raise PatchError(f"seed={given['seed']} was given without max_documents; it draws that many documents")


def digest(documents: Sequence[TokenizedDocument]) -> str:
    """SHA-256 over the token ids of all documents, in order, with their borders."""
    seen = hashlib.sha256()
    for document in documents:
        seen.update(len(document.ids).to_bytes(8, "little"))
        seen.update(document.ids.numpy().astype("<i8").tobytes())
    return seen.hexdigest()
