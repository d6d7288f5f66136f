"""What tells one source of text from another, so that tokenised text is found again."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from hfpos.data.corpus import TEXT_SUFFIXES, files_in
from hfpos.data.mixture import Source
from hfpos.data.sources import STANDARD_LIBRARY, iterate_rows, open_source
from hfpos.scheme import PatchError


def identify(source: Source) -> str:
    """A text that differs where the documents of two sources may differ; files and datasets are not read for it.

    It holds path, size and time of every file, the fingerprint of a dataset, the name of a streamed one, or a hash of strings.

    Raises:
        PatchError: a source that is not the same when it is read again, or that would have to be read beyond `max_tokens`.
    """
    options = {name: getattr(source, name) for name in ("text_column", "split", "streaming", "max_tokens")}
    return f"{_what(source)} {options}"


def _what(source: Source) -> str:
    path, split = source.path, source.split
    if isinstance(path, str) and path == STANDARD_LIBRARY:
        return f"stdlib {sys.version} {sysconfig.get_paths()['stdlib']}"
    if isinstance(path, (str, Path)) and Path(path).exists():
        return "\n".join(_stamps(Path(path).resolve(), as_dataset=source.streaming or split is not None))
    if isinstance(path, str) and source.streaming:
        return f"streamed {path}"
    rows = open_source(path, split, source.streaming)
    if isinstance(rows, (str, Path)):
        raise PatchError(f"no text at {rows}; expected a file or a folder: check the path")
    fingerprint = getattr(rows, "_fingerprint", None)
    if isinstance(fingerprint, str):
        return f"dataset {fingerprint}"
    if isinstance(rows, Iterator):
        raise PatchError(
            f"a {source.name} can be read only once; expected a list, a dataset, its name or a path: make a list of it"
        )
    if source.max_tokens is not None and not hasattr(rows, "__len__"):
        raise PatchError(
            f"max_tokens={source.max_tokens} was given with a {source.name} object, which must be read whole to know it "
            "again; give the dataset's name with streaming=True, or the first rows as take(n)"
        )
    return f"strings {_digest(iterate_rows(rows, source.text_column))}"


def _stamps(path: Path, as_dataset: bool) -> Iterator[str]:
    for file in files_in(path, ("",) if as_dataset else TEXT_SUFFIXES) if path.is_dir() else [path]:
        try:
            found = file.stat()
            yield f"{file} {found.st_size} {found.st_mtime_ns}"
        except OSError:  # a link to nowhere; reading says so
            yield f"{file} unreadable"


def _digest(texts: Iterable[tuple[str, str | PatchError]]) -> str:
    seen = hashlib.sha256()
    for _, text in texts:
        content = str(text).encode("utf-8", "surrogatepass")
        seen.update(f"{isinstance(text, str)} {len(content)} ".encode())
        seen.update(content)
    return seen.hexdigest()
