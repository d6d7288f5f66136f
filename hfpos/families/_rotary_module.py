"""A family's own rotary module with frequencies that nothing can round, move to meta or recompute."""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hfpos.constant import Constant
from hfpos.plan import Swap
from hfpos.rotation import CONVENTIONS, cos_sin, rotate
from hfpos.scheme import PatchError


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


@torch.no_grad()
def check_obeys(rotary: Any, name: str) -> None:
    """Raise `PatchError` unless the cos that a module on the CPU gives is that of its frequencies, whatever their layout."""
    for buffer in frequency_names(rotary):
        kind = [] if buffer == "inv_freq" else [buffer.removesuffix("_inv_freq")]
        try:
            table = rotary(torch.zeros(1, 1, 1), torch.tensor([[3]]), *kind)
        except Exception as error:
            raise PatchError(
                f"{name} could not be tried out ({type(error).__name__}: {error}); hfpos cannot put other frequencies into it"
            ) from error
        cos = table[0] if isinstance(table, tuple) else table.real if table.is_complex() else None
        if cos is None:
            raise PatchError(
                f"{name} gives neither cos and sin nor complex numbers; hfpos cannot put other frequencies into it"
            )
        found = cos.flatten().float().sort().values
        expected = ((3 * getattr(rotary, buffer)).cos() * getattr(rotary, scaling_name(buffer))).sort().values
        times, rest = divmod(found.numel(), expected.numel())
        if rest or not torch.allclose(found, expected.repeat_interleave(times), atol=1e-5):
            raise PatchError(f"{name} does not go by its frequencies alone; hfpos cannot put others into it")


def find_convention(decoder: nn.Module, rotary: Any, layer_type: str | None) -> str:
    """Whether a family's own rotation pairs halves or neighbours, found by rotating a random vector both ways.

    Args:
        decoder: its module is where the family's `apply_rotary_pos_emb` is.
        rotary: a module of the family, on the CPU.
        layer_type: the type of layer to ask it for; None where it knows only one.
    """
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    if getattr(apply, "__module__", "").startswith("liger_kernel"):  # which runs on no CPU and knows one way
        return "half"
    buffer = f"{layer_type}_inv_freq" if layer_type else "inv_freq"
    inv_freq, scale = getattr(rotary, buffer).float(), getattr(rotary, scaling_name(buffer))
    x = torch.randn(1, 1, 3, 2 * inv_freq.numel(), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(3)[None]
    try:
        table = rotary(x[0], positions, *([layer_type] if layer_type else []))
        one_by_one = list(inspect.signature(apply).parameters)[1] == "cos"  # type: ignore[arg-type]
        # copies: some kernels turn what they are given
        turned = apply(x.clone(), *table) if one_by_one else apply(x.clone(), x.clone(), *table)[0]  # type: ignore[misc]
    except Exception as error:
        raise PatchError(
            f"the rotation of {type(decoder).__name__} cannot be taken over by the score seam ({error}); use a scheme of the freq seam, "
            "e.g. cache='pinned' with a target_length"
        ) from error
    cos, sin = cos_sin(positions, inv_freq, scale)
    for convention in CONVENTIONS:
        if torch.allclose(turned, rotate(x, cos, sin, convention), atol=1e-5):
            return convention
    raise PatchError(
        f"{type(decoder).__name__} pairs the rotated dimensions neither by halves nor by neighbours; the score seam cannot take its rotation "
        "over. Use a scheme of the freq seam, e.g. cache='pinned' with a target_length"
    )
