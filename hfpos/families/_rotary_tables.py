"""Layers that rotate differently: the rotary module gives one table of cos and sin for each set of frequencies, each layer takes its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hfpos.call import Call


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from hfpos.attention.seam import Seam


class Tables(NamedTuple):
    """What the decoder hands to its layers in the place of one table; a tuple, so that accelerate moves it between devices."""

    tables: tuple[Any, ...]


class MoreTables:
    """Forward hook of the rotary module: adds the tables of other rotary modules of the same family to its own.

    Args:
        others: modules that nobody else holds; they follow the first one to its device.
    """

    def __init__(self, others: Sequence[nn.Module]) -> None:
        self.others = list(others)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tables:
        """The tables of all of them at the same positions."""
        device = next(module.buffers()).device
        for other in self.others:
            if next(other.buffers()).device != device:
                other.to(device)
        return Tables((output, *(other(*args, **kwargs) for other in self.others)))


class LayerTable:
    """Forward pre-hook of a layer's attention: hands it the table at `index`."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Replace the tables wherever they are among the arguments."""
        return tuple(map(self.pick, args)), {name: self.pick(value) for name, value in kwargs.items()}

    def pick(self, value: Any) -> Any:
        """The table, where `value` is a `Tables`; else `value`."""
        return value.tables[self.index] if isinstance(value, Tables) else value


class Twice:
    """Hooks of one layer's attention: each forward runs a second time with the same input and another table of cos and sin.

    Args:
        table: what is picked for the second time.
        seam: what acts inside attention then; None for nothing.
    """

    def __init__(self, table: LayerTable, seam: Seam | None = None) -> None:
        self.table = table
        self.seam = seam
        self.given: tuple[tuple, dict] = ((), {})
        self.same: bool | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep what the layer gets; to be registered before the hook that picks the first table."""
        self.given = tuple(map(self._other, args)), {name: self._other(value) for name, value in kwargs.items()}

    def _other(self, value: Any) -> Any:
        return value._replace(seam=self.seam) if isinstance(value, Call) else self.table.pick(value)

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Run it again, and compare."""
        args, kwargs = self.given
        again = module.forward(*args, **kwargs)
        first, second = (each[0] if isinstance(each, tuple) else each for each in (output, again))
        self.same = torch.equal(first, second)
