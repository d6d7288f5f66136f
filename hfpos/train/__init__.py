"""Fine-tuning to a longer context: recipes on Transformers' Trainer, and parts for other loops."""

from __future__ import annotations

import importlib
from typing import Any


# Imported when asked for: Trainer takes seconds, and the command line has to name its commands at once.
_HOMES = {
    "Recipe": "hfpos.train.recipe",
    "chunk_the_loss": "hfpos.train.head",
    "shift_attention": "hfpos.attention.shifted",
}

__all__ = ["Recipe", "chunk_the_loss", "shift_attention"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
