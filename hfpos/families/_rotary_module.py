"""A family's own rotary module with frequencies that nothing can round, move to meta or recompute."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfpos.constant import Constant
from hfpos.plan import Swap


if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class _FixedFrequencies:
    """Mixed into the class of a family's rotary module; its forward, and so its layout of cos and sin, stay the family's.

    Every `_apply` (`.to()`, `.half()`, `.bfloat16()`, `to_empty()`) sets the frequency buffers anew from float32 constants on the
    device it went to. The name of the class must not contain `RotaryEmbedding`: Transformers' `_init_weights` would recompute it.
    """

    hfpos_frequencies: dict[str, Constant]

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name, frequencies in self.hfpos_frequencies.items():
            device = getattr(self, name).device
            setattr(self, name, frequencies.values.to(device))
        return self

    def __reduce__(self) -> tuple:
        return _restore, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _fixed_class(rotary_class: Any) -> Any:
    return type("FixedRotary", (_FixedFrequencies, rotary_class), {"__module__": __name__})


def _restore(rotary_class: type) -> Any:
    cls = _fixed_class(rotary_class)
    return cls.__new__(cls)


def frequency_names(rotary: nn.Module) -> list[str]:
    """The buffers of a rotary module that hold frequencies in use: `inv_freq`, or one for each type of layer."""
    return [
        name for name, _ in rotary.named_buffers(recurse=False) if name.endswith("inv_freq") and "original" not in name
    ]


def scaling_name(frequency_name: str) -> str:
    """The attribute beside a frequency buffer that multiplies cos and sin."""
    return frequency_name.replace("inv_freq", "attention_scaling")


def fix(rotary: Any, frequencies: dict[str, torch.Tensor], scales: dict[str, float]) -> nn.Module:
    """Give `rotary`, freshly built and in nobody's hands yet, fixed frequencies and factors on cos and sin; returns it."""
    rotary.__dict__["hfpos_frequencies"] = {}
    rotary_class: Any = type(rotary)
    rotary.__class__ = _fixed_class(rotary_class)
    for name, values in frequencies.items():
        for buffer in (name, name.replace("inv_freq", "original_inv_freq")):
            if hasattr(rotary, buffer):
                constant = Constant(values)
                rotary.hfpos_frequencies[buffer] = constant
                setattr(rotary, buffer, constant.values.clone())
        setattr(rotary, scaling_name(name), scales[name])
    return rotary


@dataclass
class RotarySwap(Swap):
    """Replaces a rotary module. Its buffers are in no checkpoint, so one that was on meta comes back with its buffers computed."""

    config: Any = None

    def undo(self) -> None:
        super().undo()
        if any(buffer.is_meta for buffer in self.old.buffers()):
            with torch.device("cpu"):
                computed = type(self.old)(self.config)
            for name, buffer in computed.named_buffers():
                setattr(self.old, name, buffer.to(getattr(self.new, name).device))
