"""The learned weights of a scheme in a checkpoint: Transformers loads the base model, these come after the patch."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from hfpos.attention.learned import OWN
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_learned(model: PreTrainedModel, path: str | os.PathLike, hub: dict[str, Any]) -> None:
    """Fill the learned weights of the patched `model` from the checkpoint it was loaded from.

    Raises:
        PatchError: the checkpoint is not in safetensors, or lacks one of them.
    """
    wanted = {name: weight for name, weight in model.named_parameters() if _is_learned(name)}
    found: dict[str, torch.Tensor] = {}
    for file in _files(path, hub):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in tensors.keys() if _is_learned(key)}  # noqa: SIM118
    for name, weight in wanted.items():
        key = _counterpart(name, found)
        if key is None or found[key].shape != weight.shape:
            problem = "lacks" if key is None else f"has another shape ({tuple(found[key].shape)}) for"
            raise PatchError(
                f"the checkpoint in {path} {problem} the learned weights {name} {tuple(weight.shape)}; it is incomplete or of another model"
            )
        with torch.no_grad():
            weight.copy_(found[key])


@contextlib.contextmanager
def without_report_of_learned() -> Iterator[None]:
    """Keep Transformers from reporting the learned weights as unexpected while it loads the base model."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return not _is_learned(record.getMessage())

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def _is_learned(text: str) -> bool:
    """Whether the name of a weight, or a text that names some, is of one that a scheme has learned."""
    return any(f"{own}." in text for own in OWN)


def _counterpart(name: str, keys: Iterable[str]) -> str | None:
    """The key of a weight in the checkpoint: its last parts, as Transformers renames what stands before, and of those the most alike.

    >>> _counterpart("encoder.hfpos_bias.table", ["m.decoder.hfpos_bias.table", "m.encoder.hfpos_bias.table"])
    'm.encoder.hfpos_bias.table'
    """
    own = next(own for own in OWN if f"{own}." in name)
    alike = [key for key in keys if key.endswith(name[name.rindex(own) :])]
    return max(alike, key=lambda key: len(os.path.commonprefix((key[::-1], name[::-1]))), default=None)


def _files(path: str | os.PathLike, hub: dict[str, Any]) -> list[str]:
    """The safetensors files of a checkpoint that hold learned weights."""
    quiet = {"_raise_exceptions_for_gated_repo": False, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(str(path), INDEX, **quiet, **hub)
    if index is not None:
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        chosen = {name for key, name in names.items() if _is_learned(key)}
        return [str(cached_file(str(path), name, **hub)) for name in sorted(chosen)]
    whole = cached_file(str(path), WHOLE, **quiet, **hub)
    if whole is None:
        raise PatchError(
            f"{path} holds no {WHOLE}, which the learned weights of its scheme would be in; save it with save_pretrained"
        )
    return [str(whole)]
