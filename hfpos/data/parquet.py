"""The text column of a parquet file, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfpos.scheme import PatchError


_ROWS_AT_ONCE = 64


def read_parquet(path: Path, name: str, text_column: str) -> Iterator[tuple[str, str | PatchError]]:
    """Yield name (`name` and the row, from 1) and text of every row; where a text cannot be had, the error stands in its place."""
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise PatchError(f'to read {path} the package pyarrow is needed: pip install "hfpos[data]"') from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                yield (
                    name,
                    PatchError(
                        f"{path} has no column {text_column!r}, only {', '.join(columns)}; say which one holds the text "
                        "with text_column="
                    ),
                )
                return
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[text_column]):
                for value in batch.column(0):
                    number += 1
                    yield f"{name}:{number}", _text(path, number, value, text_column)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        yield (
            name,
            PatchError(
                f"cannot read {path} after row {number} ({reason}); expected a whole parquet file: get it anew"
            ),
        )


def _text(path: Path, number: int, value: Any, text_column: str) -> str | PatchError:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return PatchError(f"cannot read {path} row {number} ({error}); expected UTF-8 text: convert the file")
    if isinstance(text, str):
        return text
    found = "nothing" if text is None else f"a {type(text).__name__}"
    return PatchError(f"{path} row {number} has {found} in {text_column!r}; expected a text")
