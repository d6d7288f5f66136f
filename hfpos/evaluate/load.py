"""A model, its tokenizer and its text, as the command line names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn

from hfpos.checkpoint import from_pretrained, load_tokenizer
from hfpos.data.documents import DocumentSet, load_documents
from hfpos.evaluate.processes import device
from hfpos.scheme import PatchError


def load_model(source: str, dtype: str = "auto") -> tuple[nn.Module, Any]:
    """The model on this process's device, in eval mode, and its tokenizer (None if it has none).

    Args:
        source: folder or hub name of a model or PEFT adapter, or a .gguf file.
        dtype: "auto" for the one it was saved in, or e.g. "float32", "bfloat16".

    Raises:
        PatchError: it cannot be loaded.
    """
    folder, options = source, {}
    if source.endswith(".gguf"):
        if not Path(source).is_file():
            raise PatchError(f"{source} is not a file; expected a .gguf file, or the folder or hub name of a model")
        folder, options = str(Path(source).parent), {"gguf_file": Path(source).name}
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = from_pretrained(folder, dtype=dtype, **options)
        tokenizer = load_tokenizer(folder, **options)
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    return model.to(device()).eval(), tokenizer


def load_text(source: str, tokenizer: Any, model: str, **options: Any) -> DocumentSet:
    """The documents of `source`, tokenised with the tokenizer of `model`; `options` as for `hfpos.data.load_documents`."""
    if tokenizer is None:
        raise PatchError(f"no tokenizer in {model}; save the model's tokenizer there too (tokenizer.save_pretrained)")
    return load_documents(source, tokenizer, **options)


def parse_lengths(text: str) -> list[int]:
    """Context lengths as they are written on a command line; k is 1,024.

    >>> parse_lengths("512,1k,2k")
    [512, 1024, 2048]
    """
    found = []
    for part in text.split(","):
        number, times = (part.strip()[:-1], 1024) if part.strip().lower().endswith("k") else (part.strip(), 1)
        if not number.isdecimal():
            raise PatchError(f"lengths={text!r}: {part.strip()!r} is not a number of tokens; expected e.g. 512,1k,2k")
        found.append(int(number) * times)
    return found


def parse_share(text: str) -> float:
    """A share, as `1%` or `0.01`.

    >>> parse_share("1%"), parse_share("0.02")
    (0.01, 0.02)
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise PatchError(f"{text!r} is not a share; expected e.g. 1% or 0.01")
    return share
