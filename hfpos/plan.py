"""A `Plan`: the frozen list of edits that a patch makes to one model, each of which can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle


class _Absent:
    """Marks an attribute that is not there. One object, also after deepcopy and pickle."""

    def __reduce__(self) -> str:
        return "ABSENT"

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def own_attribute(target: Any, name: str) -> Any:
    """The attribute of the object itself (not of its class), or `ABSENT`."""
    for store in ("_modules", "_parameters", "_buffers"):
        if name in target.__dict__.get(store, {}):
            return getattr(target, name)
    return target.__dict__.get(name, ABSENT)


@dataclass
class Attribute:
    """Sets `target.name` to `new`; undone, it is `old` again, or gone where it was absent.

    Where modules are swapped, the one that comes back is moved to the device of the one that leaves.
    """

    target: Any
    name: str
    old: Any
    new: Any

    def apply(self) -> None:
        """Make the edit."""
        self._set(self.new)

    def undo(self) -> None:
        """Take it back."""
        self._set(self.old)

    def _set(self, value: Any) -> None:
        if value is ABSENT:
            delattr(self.target, self.name)
        else:
            setattr(self.target, self.name, value)

    def __str__(self) -> str:
        return f"{type(self.target).__name__}.{self.name}: {_brief(self.old)} -> {_brief(self.new)}"


@dataclass
class Swap(Attribute):
    """Replaces the submodule `target.name`. What is put in follows what it replaces to its device, weights also to their dtype."""

    def _set(self, value: Any) -> None:
        leaving = getattr(self.target, self.name)
        tensors = [*leaving.parameters(recurse=False), *leaving.buffers(recurse=False)]
        if tensors and not tensors[0].is_meta:
            follow(value, tensors[0])
        setattr(self.target, self.name, value)


@dataclass
class Added(Attribute):
    """Adds the submodule `target.name`, on the target's device; what is on meta stays without values, for a loader to fill."""

    def _set(self, value: Any) -> None:
        if value is not ABSENT:
            like = next(self.target.parameters())
            value = value.to(like.device, like.dtype if like.is_floating_point() else None)
        super()._set(value)


def follow(module: nn.Module, like: torch.Tensor) -> None:
    """Move the module's own tensors to the device of `like`, weights also to its dtype; what is on meta is left to its loader."""
    for parameter in module.parameters(recurse=False):
        if not parameter.is_meta:
            parameter.data = parameter.data.to(like.device, like.dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if not buffer.is_meta and buffer.device != like.device:
            setattr(module, name, buffer.to(like.device))


@dataclass
class ClassSwap(Attribute):
    """Gives the module `target` another class: its weights, name and hooks stay, its forward is the new class's.

    accelerate keeps the forward that it wraps on the module itself, as a method of the class it found; that is bound anew.
    """

    def _set(self, value: Any) -> None:
        leaving = type(self.target)
        self.target.__class__ = value
        for name in ("forward", "_old_forward"):
            if getattr(self.target.__dict__.get(name), "__func__", None) is leaving.forward:
                setattr(self.target, name, MethodType(value.forward, self.target))


@dataclass
class Trainable(Attribute):
    """Sets `requires_grad` of the parameter `target.name`, whichever tensor that is by then: loading weights replaces it."""

    def _set(self, value: Any) -> None:
        getattr(self.target, self.name).requires_grad_(value)


@dataclass
class Hook:
    """Registers a hook with `register(function, **options)` of a module."""

    target: nn.Module
    register: str
    function: Callable
    options: dict[str, Any] = field(default_factory=dict)
    handle: RemovableHandle | None = None

    def apply(self) -> None:
        """Register the hook."""
        self.handle = getattr(self.target, self.register)(self.function, **self.options)

    def undo(self) -> None:
        """Remove it."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def __str__(self) -> str:
        return f"{type(self.target).__name__}.{self.register}({getattr(self.function, '__qualname__', type(self.function).__name__)})"


Edit = Attribute | Hook


def set_attribute(target: Any, name: str, new: Any) -> Attribute:
    """The edit that sets `target.name`."""
    return Attribute(target, name, own_attribute(target, name), new)


def swap_class(module: nn.Module, cls: type) -> ClassSwap:
    """The edit that gives one module another class."""
    return ClassSwap(module, "__class__", type(module), cls)


def freeze(module: nn.Module, name: str = "weight") -> Trainable:
    """The edit that takes the parameter `module.name` out of the training."""
    return Trainable(module, name, getattr(module, name).requires_grad, False)


@dataclass
class Plan:
    """The edits of one patch, in order; `str(plan)` shows what will change."""

    edits: tuple[Edit, ...]

    def apply(self) -> None:
        """Make every edit; if one fails, the ones before it are undone and the error is raised."""
        done: list[Edit] = []
        try:
            for edit in self.edits:
                edit.apply()
                done.append(edit)
        except BaseException:
            for edit in reversed(done):
                edit.undo()
            raise

    def undo(self) -> None:
        """Take every edit back, last first."""
        for edit in reversed(self.edits):
            edit.undo()

    def __str__(self) -> str:
        return "\n".join(str(edit) for edit in self.edits)


def _brief(value: Any) -> str:
    text = (
        value.__name__
        if isinstance(value, type)
        else repr(value)
        if isinstance(value, (str, int, float, bool, _Absent))
        else type(value).__name__
    )
    return text if len(text) <= 60 else text[:57] + "..."
