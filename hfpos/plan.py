"""A `Plan`: the frozen list of edits that a patch makes to one model, each of which can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable

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
    """Replaces the submodule `target.name`. What is put in is moved to the device of what it replaces."""

    def _set(self, value: Any) -> None:
        leaving = getattr(self.target, self.name)
        tensors = [*leaving.parameters(recurse=False), *leaving.buffers(recurse=False)]
        if tensors and not tensors[0].is_meta:
            move_buffers(value, tensors[0].device)
        setattr(self.target, self.name, value)


def move_buffers(module: nn.Module, device: Any) -> None:
    """Move the module's own buffers to `device`, keeping their dtype; buffers on the meta device are left to their loader."""
    for name, buffer in module.named_buffers(recurse=False):
        if not buffer.is_meta and buffer.device != device:
            setattr(module, name, buffer.to(device))


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


def swap_module(parent: nn.Module, name: str, new: nn.Module) -> Swap:
    """The edit that replaces the submodule `parent.name`."""
    return Swap(parent, name, getattr(parent, name), new)


def swap_class(module: nn.Module, cls: type) -> Attribute:
    """The edit that gives one module another class: its parameters, name and hooks stay, its forward is the new class's."""
    return Attribute(module, "__class__", type(module), cls)


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
        if isinstance(value, (str, int, float, bool))
        else type(value).__name__
    )
    return text if len(text) <= 60 else text[:57] + "..."
