"""Where text comes from: files, rows of a dataset, a dataset by its name, strings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hfpos.data.corpus import TEXT_SUFFIXES, Document, iterate_files, split_documents, standard_library
from hfpos.scheme import PatchError


STANDARD_LIBRARY = "stdlib"
LIBRARY_SPLITS = ("train", "held_out")


def read_source(
    source: Any, text_column: str, split: str | None, *, streaming: bool = False, start: int = 0
) -> Iterator[tuple[str, str | PatchError]]:
    """Yield the name and the text of every document; where a text cannot be had, the error stands in its place.

    Nothing is read before it is asked for, and no more than one document is held.

    Args:
        source: see `hfpos.data.load_documents`.
        text_column: the field that holds the text, where `source` has rows.
        split: of a dataset that has several; of a folder, as `datasets.load_dataset` finds it; of "stdlib" `train` or `held_out`, which
            share no file.
        streaming: `source` is a dataset's name or folder, read by `datasets.load_dataset(..., streaming=True)`.
        start: leave out so many documents at the beginning.

    Raises:
        PatchError: nothing can be read from `source` at all, or a `split` is asked for or missing.

    >>> list(read_source(["one", {"text": "two"}], text_column="text", split=None))
    [('document 0', 'one'), ('document 1', 'two')]
    """
    part = None
    if isinstance(source, str) and source == STANDARD_LIBRARY:
        part, split = split, None
    source = open_source(source, split, streaming)
    if isinstance(source, str) and source == STANDARD_LIBRARY:
        library = ((document.name, document.text) for document in _library(part))
        texts: Iterator[tuple[str, str | PatchError]] = itertools.islice(library, start, None)
    elif isinstance(source, (str, Path)):
        texts = itertools.islice(iterate_files(source, text_column), start, None)
    else:
        texts = iterate_rows(source, text_column, start)
    for name, text in texts:
        yield name, _check_text(name, text)


def open_source(source: Any, split: str | None, streaming: bool = False) -> Any:
    """Find what is to be read: "stdlib", a file, a folder, or an iterable of rows or strings.

    Raises:
        PatchError: no such dataset, a `split` that is asked for or missing, or `streaming` of what is no dataset.
    """
    if isinstance(source, (str, Path)) and source != STANDARD_LIBRARY:
        is_name = isinstance(source, str) and not Path(source).exists()
        if is_name or (Path(source).is_dir() and (streaming or split is not None)):
            source = _load_dataset(str(source), split, streaming)
            split = split if isinstance(source, Mapping) else None
    elif streaming:
        raise PatchError(
            f"streaming=True was given with {describe_source(source)}; expected the name or folder of a dataset: leave "
            "streaming out"
        )
    if isinstance(source, Mapping):
        source, split = _take_split(source, split), None
    if split is not None:
        raise PatchError(
            f"split={split!r} was given with {describe_source(source)}, which has no splits; leave split out"
        )
    return source


def _library(part: str | None) -> list[Document]:
    documents = standard_library()
    if part is None:
        return documents
    parts = dict(zip(LIBRARY_SPLITS, split_documents(documents), strict=True))
    if part not in parts:
        raise PatchError(
            f"split={part!r} was given with stdlib; expected {' or '.join(LIBRARY_SPLITS)}, or leave split out"
        )
    return parts[part]


def describe_source(source: Any) -> str:
    """A short name for the record: the path or name as it was given, else what kind of object it is.

    >>> describe_source(["one", "two"])
    'list of 2'
    """
    if isinstance(source, (str, Path)):
        return str(source)
    size = f" of {len(source)}" if hasattr(source, "__len__") else ""
    return f"{type(source).__name__}{size}"


def _load_dataset(source: str, split: str | None, streaming: bool) -> Any:
    """By its name or folder, with the configuration behind a colon: `Salesforce/wikitext:wikitext-103-raw-v1`."""
    path, _, config = source.partition(":")
    is_folder = Path(path).is_dir()
    if not is_folder and (source.endswith(TEXT_SUFFIXES) or source.startswith((".", "/"))):
        raise PatchError(f"no text at {source}; expected a file or a folder: check the path")
    try:
        import datasets
    except ImportError as error:
        need = "to read a folder as a dataset" if is_folder else "it is no file or folder, and to look for a dataset"
        raise PatchError(f'{source!r}: {need} the package datasets is needed: pip install "hfpos[data]"') from error
    options: dict[str, Any] = ({"streaming": True} if streaming else {}) | ({"name": config} if config else {})
    try:
        found = datasets.load_dataset(path, split=split, **options)
        first = next(iter(found.values())) if isinstance(found, Mapping) else found
        if is_folder and first.info.builder_name == "text":  # which would take every line for a document
            return datasets.load_dataset(path, split=split, sample_by="document", **options)
        return found
    except Exception as error:
        tried = "no folder" if is_folder else "no file or folder, and no dataset"
        raise PatchError(
            f"{source!r} is {tried} that datasets can load with split={split!r} "
            f"({one_line(error)}); check the spelling{'' if is_folder else ' and the network'}"
        ) from error


def one_line(error: Exception) -> str:
    """The kind of an error and what it says, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _take_split(source: Mapping[str, Any], split: str | None) -> Any:
    splits = ", ".join(map(str, source))
    if split is None and len(source) == 1:
        return next(iter(source.values()))
    if split is None:
        raise PatchError(f"the dataset has the splits {splits}; say which one is meant with split=")
    if split not in source:
        raise PatchError(f"the dataset has no split {split!r}; it has {splits}")
    return source[split]


def iterate_rows(source: Any, text_column: str, start: int = 0) -> Iterator[tuple[str, str | PatchError]]:
    """Yield name and text of rows or strings from row `start` on; where a text cannot be had, the error stands in its place.

    Raises:
        PatchError: `source` cannot be iterated over, or has no such column.
    """
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise PatchError(
            f"cannot read documents from a {type(source).__name__}; expected a path, a dataset, its name, or a list of strings"
        )
    columns = getattr(source, "column_names", None)
    if isinstance(columns, list):
        if text_column not in columns:
            raise PatchError(
                f"the dataset has no column {text_column!r}, only {', '.join(columns)}; say which one holds the text with "
                "text_column="
            )
        source = source.select_columns([text_column])  # type: ignore[attr-defined]
    # a dataset knows better than we do how to leave rows out
    rows = source.skip(start) if hasattr(source, "skip") else itertools.islice(source, start, None)
    for index, row in enumerate(rows, start):
        name = f"document {index}"
        text = row.get(text_column) if isinstance(row, Mapping) else row
        if isinstance(text, str):
            yield name, text
            continue
        found = f"a row with the fields {sorted(row)}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
        yield name, PatchError(f"{name} is {found}; expected a text, or a row with a string field {text_column!r}")


def _check_text(name: str, text: str | PatchError) -> str | PatchError:
    if isinstance(text, PatchError):
        return text
    if not text.strip():
        return PatchError(f"{name} is empty; expected text: take it out, or skip bad documents")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return PatchError(f"{name} is no valid Unicode ({error}); expected UTF-8 text: repair it, or leave it out")
    return text
