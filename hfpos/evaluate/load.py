"""A model, its tokenizer and its text, as the command line names them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

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
    with without_loading_bars():
        model = from_pretrained(folder, dtype=dtype, **options)
        tokenizer = load_tokenizer(folder, **options)
    return model.to(device()).eval(), tokenizer


def load_text(source: str, tokenizer: Any, model: str, **options: Any) -> DocumentSet:
    """The documents of `source`, tokenised with the tokenizer of `model`; `options` as for `hfpos.data.load_documents`."""
    require_tokenizer(tokenizer, model)
    return load_documents(source, tokenizer, **options)


def require_tokenizer(tokenizer: Any, model: str | Path) -> None:
    """Raise `PatchError` where `model`, a folder or hub name, has brought no tokenizer."""
    if tokenizer is None:
        raise PatchError(f"no tokenizer in {model}; save the model's tokenizer there too (tokenizer.save_pretrained)")


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """Transformers shows a bar for each small file it reads or writes, in the midst of our own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
