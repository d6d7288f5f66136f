"""Where the text of an evaluation comes from: files, rows of a dataset, a dataset by its name, strings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hfpos.data.corpus import JSONL_SUFFIXES, PLAIN_SUFFIXES, iterate_files, standard_library
from hfpos.scheme import PatchError


STANDARD_LIBRARY = "stdlib"


def read_source(source: Any, text_column: str, split: str | None) -> Iterator[tuple[str, str | PatchError]]:
    """Yield the name and the text of every document; where a text cannot be had, the error stands in its place.

    Raises:
        PatchError: nothing can be read from `source` at all, or a `split` is asked for or missing.

    >>> list(read_source(["one", {"text": "two"}], text_column="text", split=None))
    [('document 0', 'one'), ('document 1', 'two')]
    """
    if isinstance(source, str) and source != STANDARD_LIBRARY and not Path(source).exists():
        source = _load_dataset(source, split)
        split = split if isinstance(source, Mapping) else None
    if isinstance(source, Mapping):
        source, split = _take_split(source, split), None
    if split is not None:
        raise PatchError(
            f"split={split!r} was given with {describe_source(source)}, which has no splits; leave split out"
        )
    if isinstance(source, str) and source == STANDARD_LIBRARY:
        texts: Iterable[tuple[str, str | PatchError]] = (
            (document.name, document.text) for document in standard_library()
        )
    elif isinstance(source, (str, Path)):
        texts = iterate_files(source, text_column)
    else:
        texts = _rows(source, text_column)
    for name, text in texts:
        yield name, _check_text(name, text)


def describe_source(source: Any) -> str:
    """A short name for the record: the path or name as it was given, else what kind of object it is.

    >>> describe_source(["one", "two"])
    'list of 2'
    """
    if isinstance(source, (str, Path)):
        return str(source)
    size = f" of {len(source)}" if hasattr(source, "__len__") else ""
    return f"{type(source).__name__}{size}"


def _load_dataset(name: str, split: str | None) -> Any:
    if name.endswith(PLAIN_SUFFIXES + JSONL_SUFFIXES) or name.startswith((".", "/")):
        raise PatchError(f"no text at {name}; expected a file or a folder: check the path")
    try:
        import datasets
    except ImportError as error:
        raise PatchError(
            f"{name!r} is no file or folder, and to look for a dataset of that name the package datasets is needed: "
            'pip install "hfpos[data]"'
        ) from error
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:
        raise PatchError(
            f"{name!r} is no file or folder, and no dataset that can be loaded by that name with split={split!r} "
            f"({type(error).__name__}: {error}); check the spelling and the network"
        ) from error


def _take_split(source: Mapping[str, Any], split: str | None) -> Any:
    splits = ", ".join(map(str, source))
    if split is None and len(source) == 1:
        return next(iter(source.values()))
    if split is None:
        raise PatchError(f"the dataset has the splits {splits}; say which one is meant with split=")
    if split not in source:
        raise PatchError(f"the dataset has no split {split!r}; it has {splits}")
    return source[split]


def _rows(source: Any, text_column: str) -> Iterator[tuple[str, str | PatchError]]:
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
    for index, row in enumerate(source):
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
