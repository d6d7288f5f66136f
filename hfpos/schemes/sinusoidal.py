"""The fixed sinusoids of the first Transformer, in the layouts that are in use."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from hfpos.constant import exact
from hfpos.scheme import PatchError, Scheme, require_choice, require_count, require_number
from hfpos.scheme.alone import check_kind


LAYOUTS = ("interleaved", "halves", "fairseq")


@dataclass(frozen=True, kw_only=True)
class Sinusoidal(Scheme):
    """Fixed sinusoids added to the token embeddings: sin and cos of `p * w_i`, p the position, `w_i = 10000 ** (-2i / d)`, i = 0, 1, ...

    Paper: Attention Is All You Need, arXiv 1706.03762, section 3.5.

    Args:
        dim: d, the width of the embeddings, for use without a model: `Sinusoidal(512)(positions)`.
        layout: `interleaved`, the paper's: `sin(p * w_i)` in column 2i, cos in column 2i + 1. `halves` (GPT-NeoX, Marian): all sines, then
            all cosines. `fairseq` (also tensor2tensor, M2M-100): halves of the other frequencies `10000 ** (-i / (d / 2 - 1))`; where d
            is odd the last column is zero. That fairseq's models count from `padding_idx + 1` and have a row of zeros for padding is up
            to them: give positions that say so.
        scale: the factor on all of it. The paper adds the sinusoids as they are, to embeddings that it multiplies by the root of their width; where a
            model does not, sinusoids of size 1 drown its embeddings, and `scale = d ** -0.5` (as in x-transformers) has the same effect.

    >>> Sinusoidal(4)(torch.tensor([0, 1]))
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])
    >>> Sinusoidal(4, layout="halves")(torch.tensor(1))
    tensor([0.8415, 0.0100, 0.5403, 0.9999])
    """

    name = "sinusoidal"
    paper = "arXiv 1706.03762"
    summary = "fixed sinusoids added to the token embeddings"

    dim: int | None = field(default=None, kw_only=False, compare=False)
    layout: str = "interleaved"
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_choice(self.name, "layout", self.layout, LAYOUTS)
        require_number(self.name, "scale", self.scale, least=0, strictly=True)
        if self.dim is not None:
            require_count(self.name, "dim", self.dim)

    @property
    def seam(self) -> str:
        return "embed"

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """The rows (..., dim) of `positions` (...), integers or floats: float32; float64 for float64 positions."""
        if self.dim is None:
            raise PatchError("sinusoidal: how wide the rows are is not known; pass it, Sinusoidal(dim)")
        if not isinstance(positions, torch.Tensor):
            raise PatchError(f"sinusoidal: positions is a {type(positions).__name__}; expected a tensor of positions")
        check_kind(self.name, "positions", positions, whole=False)
        return self.table(positions, self.dim)

    def table(self, positions: torch.Tensor, width: int) -> torch.Tensor:
        """The rows (..., width) of `positions` (...): float32 on their device; float64 for float64 positions. Angles are float64."""
        if self.dim not in (None, width):
            raise PatchError(
                f"sinusoidal: it was made for dim={self.dim}, the embeddings of the model are {width} wide; leave dim out"
            )
        angles = positions[..., None].double() * self.frequencies(width).to(positions.device)
        rows = self.scale * torch.stack(
            (angles.sin(), angles.cos()), dim=-1 if self.layout == "interleaved" else -2
        ).flatten(-2)
        missing = width - rows.shape[-1]  # one column too many of an odd width, or, in fairseq's layout, too few
        return pad(rows, (0, missing)).to(torch.float64 if positions.dtype == torch.float64 else torch.float32)

    def frequencies(self, width: int) -> torch.Tensor:
        """The w_i in radians per token, float64: (width / 2,), rounded up; in fairseq's layout, down."""
        if self.layout != "fairseq":
            return exact([10_000.0 ** (-2 * i / width) for i in range((width + 1) // 2)])
        pairs = width // 2
        if pairs < 2:
            raise PatchError(f"sinusoidal: layout='fairseq' does not go with a width of {width}; expected at least 4")
        return exact([10_000.0 ** (-i / (pairs - 1)) for i in range(pairs)])
