"""Shifted sparse attention as attention implementations of Transformers: a mask function and an attention function for each.

In a forward in training the mask function returns `Groups` in the place of a mask, and by these the attention function knows what to do.
So gradient checkpointing computes a layer again as it was, whatever mode the model is in by then. In any other forward the mask and the
attention are those of the implementation underneath.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hfpos.attention.flash import flash_attention
from hfpos.attention.interface import SPARSE, stock_function
from hfpos.attention.shifted_groups import Groups, attend_in_groups, cut_rows
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from hfpos.attention.shifted import ShiftedAttention

# what each stands on; no name may contain "flash" or "/", which Transformers reads
NAMES = {"sdpa": "hfpos_shifted", "eager": "hfpos_shifted_eager", "flash_attention_2": "hfpos_shifted_fa2"}
REFUSED = ("softcap", "s_aux", "position_bias", "cache", *SPARSE)  # change the logits and are not done here


class Running(threading.local):
    """The forward in training that is under way in this thread, if any. A class that torch.compile can follow, unlike `ContextVar`."""

    shifted: ShiftedAttention | None = None


RUNNING = Running()


def stands_on(name: str) -> str | None:
    """What the implementation `name` of ours stands on; None where it is not one of ours."""
    return next((stock for stock, ours in NAMES.items() if ours == name), None)


def _attention(stock: str) -> Callable:
    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not isinstance(attention_mask, Groups):
            if RUNNING.shifted is not None:
                raise PatchError(
                    f"{type(module).__name__} was given a mask that shifted sparse attention cannot cut into groups, a 4-D one or one that the "
                    "model made by itself; give a 2-D attention_mask, or position_ids that restart where a document begins"
                )
            inner = flash_attention if stock == "flash_attention_2" else stock_function(stock, module)
            return inner(module, query, key, value, attention_mask, **options)
        refused = sorted(name for name in REFUSED if options.get(name) is not None)
        if refused or hasattr(module, "sinks") or options.get("is_causal") is False:
            raise PatchError(
                f"{type(module).__name__} attends in a way that shifted sparse attention would lose ({', '.join(refused) or 'sinks, or not causally'}); "
                "train without shift_attention"
            )
        output = attend_in_groups(
            attention_mask,
            query,
            key,
            value,
            scaling=options.get("scaling"),
            dropout=options.get("dropout") or 0.0,
        )
        return output, None

    attention.__name__ = NAMES[stock]
    return attention


def _mask(stock: str) -> Callable:
    def mask(batch_size: int, q_length: int, kv_length: int, mask_function: Callable, **options: Any) -> Any:
        running = RUNNING.shifted
        if running is None or options.get("config") is not running.decoder.config:
            inner = ALL_MASK_ATTENTION_FUNCTIONS[stock]
            return inner(
                batch_size=batch_size, q_length=q_length, kv_length=kv_length, mask_function=mask_function, **options
            )
        if q_length != kv_length or options.get("use_vmap"):
            raise PatchError(
                f"{type(running.model).__name__} has keys that are in no group ({kv_length} keys for {q_length} queries), or a mask function of its "
                "own; shifted sparse attention needs a key for each query and masks that follow from padding, documents and windows"
            )
        real, window = options.get("attention_mask"), options.get("local_size")
        if real is not None and bool(real.all()):
            real = None
        plain = options.get("allow_is_causal_skip", True) and (window is None or q_length < window)
        return cut_rows(
            running.length(q_length), (batch_size, q_length), real, None if plain else mask_function, options["device"]
        )

    return mask


for _stock, _name in NAMES.items():
    AttentionInterface.register(_name, _attention(_stock))
    AttentionMaskInterface.register(_name, _mask(_stock))
