"""One small registry for schemes and families: name -> class, filled by importing every module of a package."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from types import ModuleType
from typing import Generic, TypeVar

from hfpos.scheme import PatchError, did_you_mean


T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Classes by name. A duplicate name or alias raises; an unknown name raises with the nearest one.

    >>> registry = Registry("scheme")
    >>> registry.add("yarn", dict)
    >>> registry["yarm"]
    Traceback (most recent call last):
    ...
    hfpos.scheme.PatchError: unknown scheme 'yarm': did you mean 'yarn'? Available: yarn
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, T] = {}
        self._aliases: dict[str, str] = {}

    def add(self, name: str, cls: T, aliases: tuple[str, ...] = ()) -> None:
        """Enter `cls` under `name` and its `aliases`."""
        for key in (name, *aliases):
            if key in self._classes or key in self._aliases:
                raise PatchError(f"{self.kind} {key!r} is defined twice: {self[key].__module__} and {cls.__module__}")
        self._classes[name] = cls
        self._aliases |= dict.fromkeys(aliases, name)

    def remove(self, name: str) -> None:
        """Take `name` and its aliases out again."""
        del self._classes[name]
        self._aliases = {alias: target for alias, target in self._aliases.items() if target != name}

    def __getitem__(self, name: str) -> T:
        key = self._aliases.get(name, name)
        if key not in self._classes:
            raise PatchError(
                f"unknown {self.kind} {name!r}: {did_you_mean(str(name), [*self._classes, *self._aliases])}"
            )
        return self._classes[key]

    def as_dict(self) -> dict[str, T]:
        """A copy: name -> class, in the order of the names."""
        return dict(sorted(self._classes.items()))

    def discover(self, package: str, base: type) -> None:
        """Import every public module of `package` and enter the subclasses of `base` that it defines and names."""
        for module in pkgutil.iter_modules(sys.modules[package].__path__):
            loaded = importlib.import_module(f"{package}.{module.name}")
            for cls in vars(loaded).values():
                defined_here = isinstance(cls, type) and issubclass(cls, base) and cls.__module__ == loaded.__name__
                if defined_here and cls.name and cls not in self._classes.values():
                    self.add(cls.name, cls, getattr(cls, "aliases", ()))


class CallablePackage(ModuleType):
    """A package that answers a call with its registry, so that `hfpos.schemes()` and `hfpos.schemes.Yarn` both work."""

    REGISTRY: Registry

    def __call__(self) -> dict[str, type]:
        return self.REGISTRY.as_dict()
