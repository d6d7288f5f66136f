"""Text to token ids: the Python standard library, which is on every machine, or the user's own files.

Documents keep their borders all the way (one list of ids each), so that a held-out file never shares a
block with a training file.
"""

import gzip
import json
import os
import random
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hfpos.data.parquet import read_parquet
from hfpos.scheme import PatchError


PLAIN_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
PARQUET_SUFFIX = ".parquet"
TEXT_SUFFIXES = (*PLAIN_SUFFIXES, *JSONL_SUFFIXES, PARQUET_SUFFIX)

# Installed packages, test data and generated tables: not the library's own prose and code, and not alike everywhere.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "lib2to3", "encodings", "pydoc_data"})
# Below this share of letters and white space a file is a table of numbers (`stringprep.py`, `_sysconfigdata_*.py`).
_MIN_TEXT_SHARE = 0.75
_BOS, _EOS = "<s>", "</s>"


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


def standard_library(min_characters: int = 4_000) -> list[Document]:
    """Return the sources and text files of the running Python's standard library, sorted by name.

    Args:
        min_characters: shorter files are left out: they hold no long context.

    Raises:
        PatchError: this Python keeps its library in an archive, so there are no files to read.

    >>> any(document.name == "argparse.py" for document in standard_library())
    True
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in files_in(root, PLAIN_SUFFIXES, _SKIPPED_FOLDERS):
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= min_characters and _text_share(text) >= _MIN_TEXT_SHARE:
            documents.append(Document(path.relative_to(root).as_posix(), text))
    if not documents:
        raise PatchError(
            f"no library sources of {min_characters} characters or more under {root}; expected .py files there: "
            "give your own text instead"
        )
    return documents


def read_documents(path: str | Path, text_column: str = "text") -> list[Document]:
    """Read the user's text: one document a file, or one a row of JSON lines or parquet. Empty ones are left out.

    Args:
        path: a .txt, .md, .rst or .py file (UTF-8); a .jsonl, .jsonl.gz or .parquet file whose rows have a text
            field; or a folder, which is searched for all of these.
        text_column: the text field of JSON lines and parquet.

    Raises:
        PatchError: nothing there, nothing readable there, or a row without text.
    """
    documents = []
    for name, text in iterate_files(path, text_column):
        if isinstance(text, PatchError):
            raise text
        if text.strip():
            documents.append(Document(name, text))
    if not documents:
        known = ", ".join(TEXT_SUFFIXES)
        raise PatchError(f"no text in {path}; expected at least one non-empty document ({known})")
    return documents


def iterate_files(path: str | Path, text_column: str = "text") -> Iterator[tuple[str, str | PatchError]]:
    """Yield name and text of everything `read_documents` finds; where a text cannot be had, the error stands in its place.

    Raises:
        PatchError: nothing there.
    """
    path = Path(path)
    if not path.exists():
        raise PatchError(f"no text at {path}; expected a file or a folder: check the path")
    files = files_in(path, TEXT_SUFFIXES) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    for file in files:
        name = file.relative_to(root).as_posix()
        try:
            yield from _read_file(file, name, text_column)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            yield (
                name,
                PatchError(f"cannot read {file} ({error}); expected UTF-8 text: convert the file, or leave it out"),
            )


def split_documents(
    documents: Sequence[Document], held_out: float = 0.1, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Split into training and held-out documents, never dividing one between the two.

    The only exception is a single document: there is nothing to draw, so its end is held out.

    Args:
        held_out: share of all characters to hold out, 0 < held_out < 1 (whole documents: at least this much).
        seed: another seed draws other documents; the same seed always the same.

    Raises:
        PatchError: no documents, or a share outside (0, 1).

    >>> documents = [Document(str(i), "x" * 100) for i in range(10)]
    >>> train, held = split_documents(documents, held_out=0.2)
    >>> len(train), len(held)
    (8, 2)
    """
    if not documents or not 0 < held_out < 1:
        raise PatchError(
            f"cannot hold out {held_out} of {len(documents)} documents; expected a share between 0 and 1, "
            "and at least one document"
        )
    if len(documents) == 1:
        name, text = documents[0].name, documents[0].text
        cut = round(len(text) * (1 - held_out))
        return [Document(f"{name} (start)", text[:cut])], [Document(f"{name} (end)", text[cut:])]
    shuffled = random.Random(seed).sample(documents, len(documents))
    wanted = held_out * sum(len(document.text) for document in documents)
    taken, count = 0, 0
    while taken < wanted and count < len(shuffled) - 1:
        taken += len(shuffled[count].text)
        count += 1
    return shuffled[count:], shuffled[:count]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can write any text without an unknown token.

    Args:
        vocab_size: number of ids, including the 256 bytes and the two special tokens `<s>` and `</s>`.

    Raises:
        PatchError: a vocabulary too small to hold every byte.

    >>> tokenizer = train_tokenizer(["to be or not to be"], vocab_size=260)
    >>> tokenizer.decode(tokenizer("to be ☺").input_ids)
    'to be ☺'
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len((_BOS, _EOS))
    if vocab_size < smallest:
        raise PatchError(f"vocab_size={vocab_size} cannot hold every byte; expected {smallest} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_BOS, _EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_BOS, eos_token=_EOS)


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> list[list[int]]:
    """Return the token ids of each document, without special tokens.

    Nothing is cut: a document longer than the tokenizer's limit is the point here.
    """
    texts = [document.text for document in documents]
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def blocks(documents: Iterable[Sequence[int]], length: int) -> list[list[int]]:
    """Cut every document into consecutive pieces of exactly `length` tokens; a shorter rest is dropped.

    >>> blocks([[1, 2, 3, 4, 5], [6], [7, 8]], 2)
    [[1, 2], [3, 4], [7, 8]]
    """
    return [list(ids[i : i + length]) for ids in documents for i in range(0, len(ids) - length + 1, length)]


def files_in(folder: Path, suffixes: tuple[str, ...], skipped: frozenset[str] = frozenset()) -> list[Path]:
    """The files in `folder`, and in the folders in it that are neither hidden nor `skipped`, whose names end so, sorted."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.endswith(suffixes)]
    return sorted(found)


def _text_share(text: str) -> float:
    return len(re.sub(r"[^A-Za-z\s]+", "", text)) / len(text)


def _read_file(path: Path, name: str, text_column: str) -> Iterator[tuple[str, str | PatchError]]:
    if path.name.endswith(PLAIN_SUFFIXES):
        yield name, path.read_text(encoding="utf-8")
    elif path.name.endswith(JSONL_SUFFIXES):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:  # bytes, so that one broken line does not take its neighbours along
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{name}:{number}", _row_text(path, number, line, text_column)
    elif path.name.endswith(PARQUET_SUFFIX):
        yield from read_parquet(path, name, text_column)
    else:
        known = ", ".join(TEXT_SUFFIXES)
        yield name, PatchError(f"cannot read {path} as text; expected a file that ends in {known}")


def _row_text(path: Path, number: int, line: bytes, text_column: str) -> str | PatchError:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return PatchError(f"cannot read {path} line {number} ({error}); expected UTF-8 text: convert the file")
    except json.JSONDecodeError as error:
        return PatchError(f"{path} line {number} is not JSON ({error}); expected one JSON object a line")
    text = row.get(text_column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        found = f"the fields {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        return PatchError(f'{path} line {number} has {found}; expected an object with a string field "{text_column}"')
    return text
