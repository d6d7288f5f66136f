"""Token ids of documents on disk: files of some MB, read by memory map, each with its index and checksum.

`00000.tokens` holds the ids of some whole documents one after another, `00000.json` their names and lengths, what could not be
read between them, how many documents of the source have been read up to its end, and a checksum of the ids and lengths.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfpos.scheme import PatchError


@dataclass(frozen=True)
class Shard:
    """The index of one finished shard, without the names.

    Attributes:
        lengths: (documents,) int64, tokens of each.
        skipped: name and reason of each document that could not be read.
        read: documents of the source up to the end of this shard, those skipped included.
        last: whether the source ends here.
        sha256: of the ids as stored, and the lengths.
    """

    lengths: np.ndarray
    skipped: list[tuple[str, str]]
    read: int
    last: bool
    sha256: str


class Shards:
    """The token ids of all documents of one source. Only lengths are held in memory.

    Args:
        source: the source's name, for errors.
        folder: where the shards lie.
        dtype: of the stored ids.
        shards: all of them, in order.
    """

    def __init__(self, source: str, folder: Path, dtype: np.dtype, shards: Sequence[Shard]) -> None:
        self.source = source
        self.folder = folder
        self.dtype = dtype
        self.lengths = np.concatenate([shard.lengths for shard in shards])
        self.skipped = [each for shard in shards for each in shard.skipped]
        self.sha256 = hashlib.sha256(" ".join(shard.sha256 for shard in shards).encode()).hexdigest()
        counts = [len(shard.lengths) for shard in shards]
        self._first = np.cumsum([0, *counts[:-1]])  # the first document of each shard
        self._starts = np.concatenate([np.cumsum(shard.lengths) - shard.lengths for shard in shards])

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` up to but not including `stop` of a document: (stop - start,) int64.

        Raises:
            PatchError: the shard is gone or cut short.
        """
        path = tokens_path(self.folder, self._shard_of(document))
        begin = int(self._starts[document]) + start
        with self._reading(path):
            # opened for each piece: thousands of shards held open would reach the limit of open files
            found = np.memmap(path, self.dtype, "r", begin * self.dtype.itemsize, shape=(stop - start,))
            return found.astype(np.int64)

    def name(self, document: int) -> str:
        """The name of a document, read from the disk.

        Raises:
            PatchError: as for `tokens`.
        """
        number = self._shard_of(document)
        path = _index_path(self.folder, number)
        with self._reading(path):
            names = json.loads(path.read_text(encoding="utf-8"))["names"]
            return names[document - int(self._first[number])]

    @contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise PatchError(
                f"tokenised text of {self.source} cannot be read from {path} any more ({error}); start again: what is "
                "missing is made anew"
            ) from error

    def _shard_of(self, document: int) -> int:
        return int(np.searchsorted(self._first, document, side="right")) - 1


def write_shard(
    folder: Path,
    number: int,
    ids: Sequence[np.ndarray],
    names: Sequence[str],
    skipped: list[tuple[str, str]],
    read: int,
    last: bool,
    dtype: np.dtype,
) -> Shard:
    """Write a shard so that it is either there whole or not at all.

    Args:
        ids: token ids of each document, (tokens,) each.
        names: one for each document.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    lengths = np.array([len(document) for document in ids], dtype=np.int64)
    tokens = np.concatenate(ids) if ids else np.array([], dtype=np.int64)
    data = tokens.astype(dtype).tobytes()
    shard = Shard(lengths, skipped, read, last, _checksum(data, lengths))
    index = {"names": names, "lengths": lengths.tolist(), "skipped": skipped, "read": read, "last": last}
    _write(tokens_path(folder, number), data)
    _write(_index_path(folder, number), json.dumps(index | {"sha256": shard.sha256}).encode())
    return shard


def load_shard(folder: Path, number: int, dtype: np.dtype) -> Shard | None:
    """The index of a shard; None where it was not finished, or is not what was written."""
    try:
        index: dict[str, Any] = json.loads(_index_path(folder, number).read_text(encoding="utf-8"))
        lengths = np.array(index["lengths"], dtype=np.int64)
        path = tokens_path(folder, number)
        if path.stat().st_size != int(lengths.sum()) * dtype.itemsize:
            return None
        data = np.memmap(path, np.uint8, "r").data if len(lengths) else b""
        if _checksum(data, lengths) != index["sha256"] or len(index["names"]) != len(lengths):
            return None
        skipped = [(name, reason) for name, reason in index["skipped"]]
        return Shard(lengths, skipped, index["read"], index["last"], index["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_shards(folder: Path, dtype: np.dtype) -> list[Shard] | None:
    """All shards up to the last one; None where one is missing or damaged."""
    found = []
    for number in itertools.count():
        shard = load_shard(folder, number, dtype)
        if shard is None:
            return None
        found.append(shard)
        if shard.last:
            break
    return found


def tokens_path(folder: Path, number: int) -> Path:
    """The file that holds the ids of a shard."""
    return folder / f"{number:05}.tokens"


def _index_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.json"


def _checksum(data: bytes | memoryview, lengths: np.ndarray) -> str:
    seen = hashlib.sha256(lengths.astype("<i8").tobytes())
    seen.update(data)
    return seen.hexdigest()


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
