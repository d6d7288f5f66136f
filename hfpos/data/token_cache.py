"""Token ids of whole documents and the bytes they stand for, kept on disk so that no text is tokenised twice."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PreTrainedTokenizerBase

from hfpos.scheme import PatchError


# Part of every key: a change of what the file holds makes old ones unused, not wrong.
_FORMAT = "1"
_DOCUMENTS_AT_ONCE = 32  # offsets are Python tuples, many times the size of the text

Tokens = tuple[torch.Tensor, "torch.Tensor | None"]


def tokenize_cached(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, cache_dir: str | Path | None = None
) -> list[Tokens]:
    """Return for each text its ids (tokens,) and how many UTF-8 bytes each token stands for (tokens,), both int64.

    No special tokens are added and nothing is cut. A slow tokenizer does not tell where its tokens stand: None for the bytes.

    Args:
        cache_dir: where tokenised texts are kept, one file for each set of texts and tokenizer; default: the environment
            variable HFPOS_CACHE, else `hfpos/tokens` in XDG_CACHE_HOME or `~/.cache`. A folder that cannot be written to
            is a warning, a damaged file is made anew.

    Raises:
        PatchError: `tokenizer` is none.
    """
    check_tokenizer(tokenizer)
    path = (default_folder() if cache_dir is None else Path(cache_dir)) / f"{_key(texts, tokenizer)}.safetensors"
    stored = _read(path)
    if stored is None:
        stored = _pack(_tokenize(texts, tokenizer))
        _write(path, stored)
    return _unpack(stored)


def check_tokenizer(tokenizer: object) -> None:
    """Raise `PatchError` unless it is a Transformers tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        missing = "missing tokenizer" if tokenizer is None else f"the tokenizer is a {type(tokenizer).__name__}"
        raise PatchError(f"{missing}; expected a Transformers tokenizer, e.g. AutoTokenizer.from_pretrained(MODEL)")


def bytes_of_tokens(text: str, character_ends: np.ndarray) -> np.ndarray:
    """From where each token ends in characters (tokens,), how many UTF-8 bytes it stands for (tokens,): 0 or more, in sum all bytes.

    Where several tokens make up one character, the first of them has all its bytes. What the tokenizer drops (white space, say)
    counts for the token behind it, at the end of the text for the last one.

    >>> bytes_of_tokens("a☺b ", np.array([1, 2, 2, 3]))
    array([1, 3, 0, 2])
    """
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    width = 1 + sum((characters >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
    position = np.concatenate([[0], np.cumsum(width)])
    ends = np.maximum.accumulate(position[character_ends])
    ends[-1:] = position[-1]
    return np.diff(ends, prepend=0)


def _tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    tokens: list[Tokens] = []
    for start in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        some = list(texts[start : start + _DOCUMENTS_AT_ONCE])
        encoded = tokenizer(
            some,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_offsets_mapping=tokenizer.is_fast,
            verbose=False,  # no warning that a document is longer than the model: that is the point here
        )
        for index, text in enumerate(some):
            ids = torch.tensor(encoded["input_ids"][index], dtype=torch.int64)
            size = None
            if tokenizer.is_fast:
                offsets = np.array(encoded["offset_mapping"][index], dtype=np.int64).reshape(-1, 2)
                size = torch.from_numpy(bytes_of_tokens(text, offsets[:, 1]))
            tokens.append((ids, size))
    return tokens


def _key(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for part in [*serialise(tokenizer), *(text.encode() for text in texts)]:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def serialise(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Everything that decides which ids a text becomes."""
    name = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}, {tokenizer.split_special_tokens}"
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # left over from the last call, and set anew by each
        backend.pop("truncation", None)
        backend.pop("padding", None)
        return [name.encode(), json.dumps(backend, sort_keys=True).encode()]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [name.encode(), *(part for path in files for part in (path.name.encode(), path.read_bytes()))]


def default_folder() -> Path:
    """Where tokenised text is kept unless a folder is given."""
    if os.environ.get("HFPOS_CACHE"):
        return Path(os.environ["HFPOS_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hfpos" / "tokens"


def _pack(tokens: list[Tokens]) -> dict[str, torch.Tensor]:
    sizes = [size for _, size in tokens if size is not None]
    packed = {
        "ids": torch.cat([ids for ids, _ in tokens]).int(),
        "lengths": torch.tensor([len(ids) for ids, _ in tokens]),
    }
    if sizes:
        packed["token_bytes"] = torch.cat(sizes).int()
    return packed


def _unpack(packed: dict[str, torch.Tensor]) -> list[Tokens]:
    lengths = packed["lengths"].tolist()
    ids = packed["ids"].long().split(lengths)
    sizes = packed["token_bytes"].long().split(lengths) if "token_bytes" in packed else [None] * len(lengths)
    return list(zip(ids, sizes, strict=True))


def _checksum(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    digest = hashlib.sha256()
    for name in sorted(packed):
        digest.update(f"{name} {packed[name].dtype} {tuple(packed[name].shape)}".encode())
        digest.update(packed[name].numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """What the file holds, None where there is none or it is not what was written."""
    try:
        packed = load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    found = packed.pop("checksum", None)
    return packed if found is not None and torch.equal(found, _checksum(packed)) else None


def _write(path: Path, packed: dict[str, torch.Tensor]) -> None:
    """Write the file in one step: another process sees the whole file or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(save({**packed, "checksum": _checksum(packed)}))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(
            f"hfpos cannot keep tokenised text in {path.parent} ({error}); the next run tokenises it again. Set HFPOS_CACHE "
            "to a folder that can be written to",
            stacklevel=5,  # the caller of load_documents
        )
