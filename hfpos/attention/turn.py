"""The rotation of queries and keys inside attention, by positions that a scheme chooses.

Shapes: B batch, H heads, N queries or keys, D head_dim, R rotary_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hfpos.attention.once import once
from hfpos.constant import Constant
from hfpos.rotation import cos_sin, rotate


if TYPE_CHECKING:
    from hfpos.call import Call


class Turn:
    """Rotates queries or keys; layers of one forward share cos and sin.

    Args:
        inv_freq: (R/2,) radians per token; best in float64.
        convention: which dimensions are paired, as for `hfpos.rotation.rotate`.
        scale: the factor on cos and sin.
    """

    def __init__(self, inv_freq: torch.Tensor, convention: str, scale: float = 1.0) -> None:
        self.exact = inv_freq.detach().to("cpu", torch.float64)
        self.inv_freq = Constant(inv_freq)
        self.convention = convention
        self.scale = scale

    def __call__(self, x: torch.Tensor, places: torch.Tensor, call: Call) -> torch.Tensor:
        """`x` (B, H, N, D) rotated by `places` (B or 1, N), integer or float64, through angles in float64; in the dtype of `x`."""
        wide = torch.promote_types(x.dtype, torch.float32)

        def tables() -> list[torch.Tensor]:
            return [part[:, None].to(wide) for part in cos_sin(places, self.exact.to(x.device), self.scale)]

        cos, sin = once(call, f"turn in {wide}", (self, places), tables)
        return rotate(x, cos, sin, self.convention)

    def as_stock(self, x: torch.Tensor, positions: torch.Tensor, call: Call) -> torch.Tensor:
        """The same bit for bit as Transformers does it, through angles in float32 but for float64 `x`."""
        if x.dtype == torch.float64:
            return self(x, positions, call)

        def tables() -> list[torch.Tensor]:
            return [part[:, None] for part in cos_sin(positions, self.inv_freq.on(x.device), self.scale)]

        cos, sin = once(call, "turn as stock", (self, positions), tables)
        return rotate(x, cos, sin, self.convention)
