"""Registers with Transformers' attention and mask interfaces what acts inside attention; shifted attention has a file of its own.

An attention implementation and its mask function are registered under one name, always as a pair: without the second, padding is
dropped in silence. Each of ours stands on one of Transformers' and hands queries and keys to the seam in the call's `Call` first. The
names may contain neither `flash` nor `/`: Transformers reads those.

| name | stands on | masks |
|---|---|---|
| `hfpos_auto` | flex_attention on a GPU where that can do the scheme, else sdpa | sdpa's |
| `hfpos_sdpa` | sdpa | sdpa's |
| `hfpos_flex` | flex_attention | sdpa's: boolean ones, from which the blocks that are left out follow |
| `hfpos_fa2` | flash_attention_2 | its own |
| `hfpos_eager` | the family's own eager function | eager's |
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hfpos.attention.dense import eager_attention
from hfpos.attention.sequence_parallel import require_ours
from hfpos.scheme import PatchError, did_you_mean


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

PREFIX = "hfpos_"
NAMES = {
    "auto": "hfpos_auto",
    "sdpa": "hfpos_sdpa",
    "flex_attention": "hfpos_flex",
    "flash_attention_2": "hfpos_fa2",
    "eager": "hfpos_eager",
}
ALIASES = {"flex": "flex_attention", None: "sdpa"}
STOCK = {"auto": "sdpa"}  # what each stands on, where that is not the same
MASKS = {"auto": "sdpa", "flex_attention": "sdpa"}
# what families with sparse attention hand to an implementation that they do not know
SPARSE = ("indices", "block_indices")


def stock_function(backend: str, module: nn.Module) -> Callable:
    """The attention function of Transformers (`sdpa`) or of the module's own family (`eager`)."""
    if backend != "eager":
        return ALL_ATTENTION_FUNCTIONS[STOCK.get(backend, backend)]
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
        if getattr(module, "is_cross_attention", False):  # whose keys stand in another text
            return stock_function(backend, module)(module, query, key, value, attention_mask, **kwargs)
        if hfpos is not None and hfpos.part is not None and hfpos.part.mask is not None:
            attention_mask = hfpos.part.mask.to(query.device)
        if hfpos is None:
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
        if getattr(module, "ignores_position_bias", False):  # the model's own, which is switched off
            kwargs.pop("position_bias", None)
        if hfpos.seam is None:
            return stock_function(backend, module)(module, query, key, value, attention_mask, **kwargs)
        return hfpos.seam.attend(module, query, key, value, attention_mask, call=hfpos, backend=backend, **kwargs)

    attention.__name__ = NAMES[backend]
    return attention


OURS = {name: _make(backend) for backend, name in NAMES.items()}
for _backend, _name in NAMES.items():
    AttentionInterface.register(_name, OURS[_name])
    AttentionMaskInterface.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[MASKS.get(_backend, _backend)])


def patched_backend(backend: str | None, offered: tuple[str, ...]) -> str:
    """The registered name that stands on `backend`.

    Raises:
        PatchError: that is not among the backends `offered` by a seam, or its function is no longer ours.
    """
    backend = backend_of(str(backend)) or backend
    chosen = ALIASES.get(backend, backend)
    if chosen not in offered:
        raise PatchError(
            f"attention implementation {backend!r} cannot carry this scheme: {did_you_mean(str(backend), offered)}; choose one with "
            'patch(..., backend=) or model.set_attn_implementation("sdpa")'
        )
    if chosen == "flash_attention_2" and "flash_attn" not in sys.modules and find_spec("flash_attn") is None:
        raise PatchError(
            "flash_attention_2 needs the package flash-attn, which is not installed; choose backend='sdpa'"
        )
    name = NAMES[chosen]
    require_ours(name, OURS[name], None if chosen == "eager" else STOCK.get(chosen, chosen))
    return name


def backend_of(name: str) -> str | None:
    """What the registered `name` stands on; None where it is not one of ours."""
    return next((backend for backend, ours in NAMES.items() if ours == name), None)


def keep_backend(config: Any, offered: tuple[str, ...]) -> None:
    """Undo a `set_attn_implementation("eager")` made after patching, in what would lose the scheme, not in what was wanted."""
    name = patched_backend(config._attn_implementation, offered)
    if config._attn_implementation != name:
        config._attn_implementation = name
