"""The learned weights of a bias, as a module of the patched decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn


if TYPE_CHECKING:
    from collections.abc import Callable

LEARNED = "hfpos_bias"  # the decoder's attribute. Trainer leaves parameters with "bias" in their names out of the weight decay


class LearnedBias(nn.Module):
    """Parameters of shape (layers, ...), one row for each layer, or one for all where the layers share them.

    They stay float32 through `.bfloat16()` and `.half()`: near keys differ by less than those formats tell apart.

    Args:
        start: what every layer starts from.
        layers: how many layers there are.
        shared: whether all layers have the same weights.

    >>> weights = LearnedBias({"r1": torch.ones(4)}, layers=2).bfloat16()
    >>> weights()["r1"].shape, weights()["r1"].dtype
    (torch.Size([2, 4]), torch.float32)
    """

    def __init__(self, start: dict[str, torch.Tensor], layers: int, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        for name, value in start.items():
            rows = value.detach().to("cpu", torch.float32)[None].repeat(1 if shared else layers, *[1] * value.ndim)
            self.register_parameter(name, nn.Parameter(rows))

    def forward(self, _: None = None) -> dict[str, torch.Tensor]:
        """All weights by name, each (layers or 1, ...). PEFT's wrapper of a trained module insists on handing something on."""
        return dict(self.named_parameters())

    def _apply(self, function: Callable, recurse: bool = True) -> LearnedBias:
        def keep_wide(tensor: torch.Tensor) -> torch.Tensor:
            moved = function(tensor)
            narrow = moved.dtype in (torch.float16, torch.bfloat16)
            return (
                tensor.to(moved.device)
                if narrow and not tensor.is_meta
                else moved.to(tensor.dtype)
                if narrow
                else moved
            )

        return super()._apply(keep_wide, recurse)


def weights_of_layer(weights: dict[str, torch.Tensor], layer: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The weights of one layer, on `device`."""
    return {name: (rows[layer] if len(rows) > 1 else rows[0]).to(device) for name, rows in weights.items()}
