"""The only code that registers with Transformers' attention and mask interfaces.

An attention implementation and its mask function are registered under one name, always as a pair: without the second, padding is
dropped in silence. `hfpos_sdpa` stands on Transformers' `sdpa`, `hfpos_eager` on the family's own eager function; both hand queries
and keys to the seam in the call's `Call` first. The names may contain neither `flash` nor `/`: Transformers reads those.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hfpos.attention.dense import eager_attention
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

PREFIX = "hfpos_"
BACKENDS = ("sdpa", "eager")
SPARSE = (
    "indices",
    "block_indices",
)  # what families with sparse attention hand to an implementation that they do not know


def stock_function(backend: str, module: nn.Module) -> Callable:
    """The attention function of Transformers (`sdpa`) or of the module's own family (`eager`)."""
    if backend != "eager":
        return ALL_ATTENTION_FUNCTIONS[backend]
    family = sys.modules[type(module).__module__]
    return getattr(family, "eager_attention_forward", eager_attention)


def is_fused(function: Callable) -> bool:
    """Whether `function` is a kernel that never rounds attention logits to the dtype of its inputs."""
    return function is ALL_ATTENTION_FUNCTIONS["sdpa"]


def _make(backend: str) -> Callable:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        hfpos: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inner = stock_function(backend, module)
        if hfpos is None and not getattr(module, "is_cross_attention", False):
            raise PatchError(
                f"{type(module).__name__} was called without the positions of its tokens: this family's layers do not hand keyword "
                "arguments on to attention, so a bias or a cached rotation cannot reach it; use a scheme of the freq seam"
            )
        chosen = sorted(name for name in SPARSE if kwargs.get(name) is not None)
        if chosen:
            raise PatchError(
                f"{type(module).__name__} attends to chosen keys only ({', '.join(chosen)}), which this scheme's attention would lose; use a "
                "scheme of the freq seam"
            )
        if hfpos is None or hfpos.seam is None:
            return inner(module, query, key, value, attention_mask, **kwargs)
        return hfpos.seam.attend(module, query, key, value, attention_mask, call=hfpos, inner=inner, **kwargs)

    attention.__name__ = f"{PREFIX}{backend}"
    return attention


for _backend in BACKENDS:
    AttentionInterface.register(PREFIX + _backend, _make(_backend))
    AttentionMaskInterface.register(PREFIX + _backend, ALL_MASK_ATTENTION_FUNCTIONS[_backend])


def patched_backend(backend: str | None) -> str:
    """The registered name that stands on `backend`; `PatchError` where there is none."""
    backend = backend or "sdpa"
    if backend.startswith(PREFIX):
        return backend
    if backend not in BACKENDS:
        raise PatchError(
            f"attention implementation {backend!r} cannot carry this scheme; expected one of {BACKENDS}: call "
            'model.set_attn_implementation("sdpa") first'
        )
    return PREFIX + backend


def keep_backend(config: Any) -> None:
    """Undo a `set_attn_implementation("eager")` made after patching, in what would lose the scheme, not in what was wanted."""
    if not str(config._attn_implementation).startswith(PREFIX):
        config._attn_implementation = patched_backend(config._attn_implementation)
