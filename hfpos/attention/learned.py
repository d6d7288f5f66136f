"""The learned weights of a scheme, as modules of the patched decoder, or of a model of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
import torch
from torch import nn

from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.scheme import Bias

LEARNED = "hfpos_bias"  # the decoder's attribute. Trainer leaves parameters with "bias" in their names out of the weight decay
TABLE = "hfpos_table"  # the same for a table of positions, which is decayed as the embeddings are
OWN = (LEARNED, TABLE)


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


class BiasModule(nn.Module):
    """A bias whose weights are learned, for one layer of a model of one's own; see `Bias.module`.

    Args:
        scheme: gives the bias.
        start: what its weights start from.
    """

    def __init__(self, scheme: Bias, start: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.scheme = scheme
        setattr(self, LEARNED, LearnedBias(start, layers=1))

    def forward(
        self, q_positions: torch.Tensor, k_positions: torch.Tensor, query: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The bias (H, Q, K), or with a batch in front, of positions (Q,) and (K,); query (H, Q, D), scaled, where it is read."""
        weights = weights_of_layer(getattr(self, LEARNED)(), 0, q_positions.device)
        return self.scheme.bias(q_positions, k_positions, weights, query)


class LearnedTable(nn.Module):
    """A trainable table of positions, zeros at first: a model starts without positions, alike in every run.

    Args:
        length: rows, i.e. positions 0 .. length - 1.
        width: of a row.

    >>> LearnedTable(4, 2)(torch.tensor([[0, 3]])).shape
    torch.Size([1, 2, 2])
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        # by numpy: inside DeepSpeed's `zero.Init` torch's own constructors round
        self.weight = nn.Parameter(torch.from_numpy(numpy.zeros((length, width), dtype=numpy.float32)))

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """The rows (..., width) of whole `positions` (...), in the dtype of the table. Raises `PatchError` beyond its end."""
        length = self.weight.shape[0]
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise PatchError(
                f"learned: positions have the dtype {positions.dtype}; expected whole numbers, e.g. torch.int64"
            )
        if not torch.compiler.is_compiling() and not positions.is_meta and positions.numel():
            least, most = (int(end) for end in positions.aminmax())
            if least < 0 or most >= length:
                raise PatchError(
                    f"learned: position {most if most >= length else least} is outside of the table of {length} positions, 0 .. {length - 1}; "
                    "shorten the input, or patch with a longer target_length and train that"
                )
        return nn.functional.embedding(positions.to(self.weight.device), self.weight)

    def extra_repr(self) -> str:
        """Its size, for `print(model)`."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"
