"""A learned position table: the model's own, resized, or a new one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hfpos.scheme import Geometry, PatchError, Scheme, require_choice, require_count, require_length


if TYPE_CHECKING:
    from hfpos.attention.learned import LearnedTable


@dataclass(frozen=True, kw_only=True)
class Learned(Scheme):
    """A learned table of positions, one row for each, added to the token embeddings.

    Where the model has one (GPT-2, OPT) it is resized to any length, and the model stays a stock one with a longer table. Elsewhere the
    model's own positions are switched off and a new table, `hfpos_table`, is trained, saved and loaded with the model.

    Paper: Convolutional Sequence to Sequence Learning, arXiv 1705.03122, section 3.1.

    Deviations: a new table starts at zero, where models draw it at random: the model starts without positions, alike in every run.

    Args:
        dim: width of the embeddings, for use without a model: `Learned(512, target_length=1024).module()`.
        target_length: rows of the table, i.e. the longest input in tokens; of a new one the trained length unless given.
        init: what a resized table starts from: `copy` keeps the trained rows bit-equal and sets new ones to their mean; `tile` keeps
            them bit-equal and repeats them; `interpolate` stretches the trained table linearly over the new length (no row stays as
            it was).
    """

    name = "learned"
    paper = "arXiv 1705.03122"
    summary = (
        "a learned table of positions: the trained one, resized by copying, tiling or interpolation, or a new one"
    )
    learned = True

    dim: int | None = field(default=None, kw_only=False, compare=False)
    target_length: int | None = None
    init: str = "copy"

    def __post_init__(self) -> None:
        if self.dim is not None:
            require_count(self.name, "dim", self.dim)
        if self.target_length is not None:
            require_length(self.name, "target_length", self.target_length)
        require_choice(self.name, "init", self.init, ("copy", "interpolate", "tile"))

    @property
    def seam(self) -> str:
        return "embed"

    def patched_length(self, geometry: Geometry) -> int | None:
        return self.target_length or geometry.trained_length

    def new_table(self, width: int, length: int | None = None) -> LearnedTable:
        """A table of `target_length` rows, or `length` where that is not given, for embeddings of this `width`: all zeros.

        Raises:
            PatchError: no length, another width than `dim`, or an `init` that says what to do with trained rows, of which there are none.
        """
        from hfpos.attention.learned import LearnedTable  # attention imports schemes

        rows = self.target_length or length
        if rows is None:
            raise PatchError("learned: how long the table is to be is not known; pass target_length= (tokens)")
        if self.dim not in (None, width):
            raise PatchError(
                f"learned: it was made for dim={self.dim}, the embeddings of the model are {width} wide; leave dim out"
            )
        if self.init != "copy":
            raise PatchError(
                f"learned: init={self.init!r} is for a model that has a table of positions, and there is none to start from; leave init out, "
                "the new table starts at zero"
            )
        return LearnedTable(rows, width)

    def module(self) -> LearnedTable:
        """The table as a torch module, for a model of your own: called with whole positions (...) it gives rows (..., dim).

        Raises:
            PatchError: `dim` or `target_length` was not given.

        >>> Learned(64, target_length=128).module()(torch.arange(5)).shape
        torch.Size([5, 64])
        """
        if self.dim is None:
            raise PatchError("learned: how wide the rows are is not known; pass it, Learned(dim, target_length=1024)")
        return self.new_table(self.dim)

    def resize(self, trained: torch.Tensor) -> torch.Tensor:
        """The new table (target_length, width) from the trained one (length, width), in its dtype.

        >>> Learned(target_length=4, init="tile").resize(torch.tensor([[1.0], [2.0]])).flatten()
        tensor([1., 2., 1., 2.])
        """
        if self.target_length is None:
            raise PatchError("learned: how long the table is to be is not given; pass target_length= (tokens)")
        length = trained.shape[0]
        if self.init == "interpolate":
            columns = trained.float().T[None]
            stretched = torch.nn.functional.interpolate(columns, self.target_length, mode="linear", align_corners=True)
            return stretched[0].T.contiguous().to(trained.dtype)
        rows = torch.arange(self.target_length, device=trained.device)
        table = trained[rows % length]
        if self.init == "copy":
            table[length:] = trained.float().mean(0).to(trained.dtype)
        return table
