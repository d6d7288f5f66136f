"""Text tokenised once, to shards on disk: killed and begun again it goes on, and of several processes one does it."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, TextColumn
from transformers import PreTrainedTokenizerBase

from hfpos.data.identity import identify
from hfpos.data.mixture import Source
from hfpos.data.shards import Shard, Shards, load_shard, load_shards, write_shard
from hfpos.data.sources import one_line, read_source
from hfpos.data.token_cache import check_tokenizer, default_folder, serialise
from hfpos.scheme import PatchError


# Part of every key: a change of what the files hold makes old ones unused, not wrong.
_FORMAT = "1"
_TOKENS_A_SHARD = 4_000_000
_DOCUMENTS_AT_ONCE, _CHARACTERS_AT_ONCE = 64, 1_000_000  # ids come as Python integers, many times the size of the text

Text = tuple[str, "str | PatchError"]
Tokens = tuple[str, "np.ndarray | PatchError"]


def tokenize_source(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    skip_bad: bool = False,
    cache_dir: str | Path | None = None,
) -> Shards:
    """Tokenise a source without special tokens, document by document, or find what an earlier run has tokenised.

    In memory are only a few documents (a million characters, or one that is longer) and the tokens of one shard.

    Args:
        source: what to read.
        tokenizer: the model's.
        skip_bad: go on where a file or row cannot be read or is empty, and list it as skipped. Without it that is an error.
        cache_dir: the shards lie in a folder `shards` in it; default: the environment variable HFPOS_CACHE, else `hfpos` in
            XDG_CACHE_HOME or `~/.cache`.

    Raises:
        PatchError: text that cannot be read, no text, no tokenizer, or no room on the disk.
    """
    check_tokenizer(tokenizer)
    folder = _cache_root(cache_dir) / "shards" / _key(source, tokenizer)
    dtype = _dtype(tokenizer)
    shards = load_shards(folder, dtype)
    if shards is None:
        with _locked(source, folder):  # another process may make them while this one waits
            shards = load_shards(folder, dtype) or _make_shards(source, tokenizer, skip_bad, folder, dtype)
    found = Shards(source.name, folder, dtype, shards)
    if found.skipped and not skip_bad:  # made by a run that skipped
        raise PatchError(found.skipped[0][1])
    if not len(found.lengths):
        first = f"; {len(found.skipped)} cannot be, the first: {found.skipped[0][1]}" if found.skipped else ""
        raise PatchError(f"no text in {source.name}; expected at least one document that can be used{first}")
    return found


def _make_shards(
    source: Source, tokenizer: PreTrainedTokenizerBase, skip_bad: bool, folder: Path, dtype: np.dtype
) -> list[Shard]:
    """All shards of a source: those that are whole already, and the missing and damaged ones between and after them."""
    shards: list[Shard] = []
    documents = None  # from where the last shard ends
    read = tokens = 0
    console = Console(stderr=True)
    columns = (TextColumn("tokenising {task.description}: {task.completed:,} tokens", markup=False),)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(source.name, total=None)
        for number in itertools.count():
            shard = load_shard(folder, number, dtype)
            if shard is not None:
                documents = None
            else:
                documents = documents or _tokenise(source, tokenizer, skip_bad, read, tokens)
                shard = _make_shard(source, documents, folder, number, read, dtype)
            shards.append(shard)
            read, tokens = shard.read, tokens + int(shard.lengths.sum())
            bar.update(task, completed=tokens)
            if shard.last:
                break
    return shards


def _make_shard(
    source: Source, documents: Iterator[Tokens], folder: Path, number: int, read: int, dtype: np.dtype
) -> Shard:
    """Write the next shard. Where it ends depends on the documents alone, so that an interrupted run gives the same shards."""
    ids: list[np.ndarray] = []
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    size = 0
    for name, found in documents:
        read += 1
        if isinstance(found, PatchError):
            skipped.append((name, str(found)))
            continue
        ids.append(found.astype(dtype))
        names.append(name)
        size += len(found)
        if size >= _TOKENS_A_SHARD:
            break
    last = size < _TOKENS_A_SHARD
    with _disk(source, folder):
        return write_shard(folder, number, ids, names, skipped, read, last, dtype)


def _tokenise(
    source: Source, tokenizer: PreTrainedTokenizerBase, skip_bad: bool, read: int, tokens: int
) -> Iterator[Tokens]:
    """The name and the ids (tokens,) of each document after the first `read`, which had `tokens` tokens; or why it has none."""
    left = math.inf if source.max_tokens is None else source.max_tokens - tokens
    texts = _read(source, read) if left > 0 else iter(())
    while left > 0 and (batch := _batch(texts, min(left, _CHARACTERS_AT_ONCE))):
        good = [text for _, text in batch if isinstance(text, str)]
        # no warning that a document is longer than the model: that is the point here
        encoded = iter(tokenizer(good, add_special_tokens=False, verbose=False)["input_ids"] if good else [])
        for name, text in batch:
            found = text if isinstance(text, PatchError) else np.array(next(encoded), dtype=np.int64)
            if not isinstance(found, PatchError) and not len(found):
                found = PatchError(f"{name} has no tokens: the tokenizer drops all of its text; leave it out")
            if isinstance(found, PatchError):
                if not skip_bad:
                    raise found
                yield name, found
            elif left > 0:
                found = found[: int(min(left, len(found)))]
                left -= len(found)
                yield name, found


def _batch(texts: Iterator[Text], characters: float) -> list[Text]:
    """The next documents, until they have so many characters: with a limit of tokens no more than needed is read."""
    batch: list[Text] = []
    for name, text in texts:
        batch.append((name, text))
        characters -= len(text) if isinstance(text, str) else 0
        if characters <= 0 or len(batch) == _DOCUMENTS_AT_ONCE:
            break
    return batch


def _read(source: Source, start: int) -> Iterator[Text]:
    texts = read_source(source.path, source.text_column, source.split, streaming=source.streaming, start=start)
    for number in itertools.count(start):
        try:
            name, text = next(texts)
        except StopIteration:
            return
        except PatchError:
            raise
        except Exception as error:
            raise PatchError(
                f"{source.name} cannot be read on after document {number} ({one_line(error)}); "
                "start again: what has been tokenised is kept"
            ) from error
        yield name, text


def _key(source: Source, tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for part in [identify(source).encode("utf-8", "surrogateescape"), *serialise(tokenizer)]:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def _dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """The smallest type that holds every id."""
    largest = max(len(tokenizer) - 1, max(tokenizer.get_vocab().values(), default=0))
    return np.dtype("<u2" if largest <= np.iinfo(np.uint16).max else "<u4")


def _cache_root(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    return default_folder() if os.environ.get("HFPOS_CACHE") else default_folder().parent


@contextmanager
def _locked(source: Source, folder: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    lock = FileLock(folder / "lock")
    with _disk(source, folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk(source: Source, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PatchError(
            f"tokenised text of {source.name} cannot be kept in {folder} ({error}); expected a folder that can be written to, "
            "with room: set HFPOS_CACHE or cache_dir to another, or make room. Finished shards are kept"
        ) from error
