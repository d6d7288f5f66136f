"""A learned position table, resized."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfpos.scheme import Geometry, Scheme, require_choice, require_length


@dataclass(frozen=True, kw_only=True)
class Learned(Scheme):
    """A learned table of positions, resized to any length; the model stays a stock one with a longer table.

    Args:
        target_length: rows of the new table, i.e. the longest input in tokens.
        init: `copy` keeps the trained rows bit-equal and sets new ones to their mean; `tile` keeps them bit-equal and repeats
            them; `interpolate` stretches the trained table linearly over the new length (no row stays as it was).
    """

    name = "learned"
    paper = "arXiv 1705.03122"
    summary = "the trained table of positions, resized by copying, tiling or interpolation"

    target_length: int
    init: str = "copy"

    def __post_init__(self) -> None:
        require_length(self.name, "target_length", self.target_length)
        require_choice(self.name, "init", self.init, ("copy", "interpolate", "tile"))

    @property
    def seam(self) -> str:
        return "embed"

    def patched_length(self, geometry: Geometry) -> int:
        return self.target_length

    def resize(self, trained: torch.Tensor) -> torch.Tensor:
        """The new table (target_length, width) from the trained one (length, width), in its dtype.

        >>> Learned(target_length=4, init="tile").resize(torch.tensor([[1.0], [2.0]])).flatten()
        tensor([1., 2., 1., 2.])
        """
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
