"""Tables of positions: one that adds nothing, one resized, and one that is read where tokens stand."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hfpos.plan import freeze, swap_class
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from hfpos.plan import Edit
    from hfpos.positions import PositionHook


class NoPositions(nn.Embedding):
    """A position table that adds nothing; it keeps its weights, so that they are saved."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A zero without dimensions: it broadcasts, and leaves dtype and device of what it is added to as they are."""
        return torch.zeros(())


def switched_off(table: Any) -> list[Edit]:
    """The edits that make a table of positions add nothing.

    Raises:
        PatchError: it is no plain table any more.
    """
    if not isinstance(table, nn.Embedding):
        raise PatchError(
            f"the position table is a {type(table).__name__}, which cannot be switched off; expected an nn.Embedding: patch the model "
            "before anything wraps its table"
        )
    # an optimizer or DDP would trip over a trainable weight that takes no part
    return [swap_class(table, NoPositions), freeze(table)]


def resized_table(table: Any, scheme: Any, offset: int | None = None) -> Any:
    """A copy of `table` of the same class, with the rows that `scheme.resize` makes; those before its `offset` stay as they are.

    Args:
        offset: the rows before that of position 0; what the table says of itself unless given.

    Raises:
        PatchError: it is no table of floating point numbers, or its weights are not there.
    """
    if not isinstance(table, nn.Embedding) or not table.weight.is_floating_point():
        raise PatchError(
            f"the position table is a {type(table).__name__}, which cannot be resized; expected a plain nn.Embedding"
        )
    if table.weight.is_meta:
        raise PatchError(
            "the position table has no weights yet, or they are offloaded; there is nothing to resize: load them first, in memory"
        )
    offset = offset_of(table) if offset is None else offset
    trained = table.weight.detach()
    rows = torch.cat((trained[:offset], scheme.resize(trained[offset:])))
    resized = copy.deepcopy(table)
    resized.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
    resized.num_embeddings = len(rows)
    return resized


def offset_of(table: nn.Module) -> int:
    """The rows of a table before that of position 0: two in models that come from fairseq."""
    return getattr(table, "offset", 0)


class RowsInPlace:
    """Forward hook of a position table: the rows of where tokens stand, whatever the decoder asked for, some know no positions but a count."""

    def __init__(self, source: PositionHook) -> None:
        self.source = source

    def __call__(self, module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """The rows (B, Q, E) of the positions of the call under way."""
        if self.source.positions is None:
            return output
        return nn.functional.embedding(
            self.source.positions.to(module.weight.device) + offset_of(module), module.weight
        )
