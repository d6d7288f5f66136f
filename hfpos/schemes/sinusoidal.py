"""The fixed sinusoids of the first Transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Sinusoidal(Scheme):
    """Fixed sinusoids added to the token embeddings: `sin(p * w_i)` in column 2i, `cos(p * w_i)` in 2i + 1, `w_i = 10000 ** (-2i / d)`.

    Paper: Attention Is All You Need, arXiv 1706.03762, section 3.5.
    """

    name = "sinusoidal"
    paper = "arXiv 1706.03762"
    summary = "fixed sinusoids added to the token embeddings"

    @property
    def seam(self) -> str:
        return "embed"

    def table(self, positions: torch.Tensor, width: int) -> torch.Tensor:
        """The rows (..., width) of integer `positions` (...): float32 on their device; float64 for float64 positions.

        >>> Sinusoidal().table(torch.tensor([0, 1]), 2)
        tensor([[0.0000, 1.0000],
                [0.8415, 0.5403]])
        """
        dtype = torch.float64 if positions.dtype == torch.float64 else torch.float32
        frequencies = inverse_frequencies(10_000.0, width + width % 2).to(positions.device, dtype)
        angles = positions[..., None].to(dtype) * frequencies
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]
