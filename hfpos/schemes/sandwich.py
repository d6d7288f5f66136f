"""Sandwich: inner products of sinusoids as a fixed bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfpos.constant import exact
from hfpos.scheme import Bias, Geometry, PatchError, require_choice


@dataclass(frozen=True, kw_only=True)
class Sandwich(Bias):
    """Sandwich: `(sum_k cos((i - j) * w_k) - dim / 2) / r_h`, `w_k = 10000 ** (-2 k / dim)`, `r_h = 8 h / heads` for head h = 1, 2, ...

    The sum is the inner product of the sinusoids of positions i and j, with k = 0 .. dim/2 - 1; the first head falls the fastest.

    Paper: Dissecting Transformer Length Extrapolation via the Lens of Receptive Field Analysis, arXiv 2212.10356.

    Deviations: `dim / 2` is subtracted, so that the bias is 0 at distance 0; the softmax does not see it.

    Args:
        dim: width of the sinusoids, even; the paper's value is 128, whatever the width of a head.
        variant: `paper`, or `nemo` for k = 1 .. dim/2 as in NVIDIA's NeMo, which is another curve.
    """

    name = "sandwich"
    paper = "arXiv 2212.10356"
    summary = "inner products of sinusoids added to the logits"

    dim: int = 128
    variant: str = "paper"

    def __post_init__(self) -> None:
        require_choice(self.name, "variant", self.variant, ("paper", "nemo"))
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or self.dim < 2 or self.dim % 2:
            raise PatchError(f"sandwich: dim={self.dim!r} is not usable; expected an even whole number >= 2")

    @property
    def two_sided(self) -> bool:
        return True

    def weights(self, geometry: Geometry) -> dict[str, torch.Tensor]:
        """`compression` (H,): what the curve of each head is divided by."""
        return {"compression": exact([8 * h / geometry.heads for h in range(1, geometry.heads + 1)])}

    def sinusoids(self, positions: torch.Tensor) -> torch.Tensor:
        """cos, then sin, of integer `positions` (...) at every frequency: (..., dim), float64.

        In float32 an angle of 131,071 radians would be off by 0.004; and `arange` of integers is exact also where DeepSpeed's
        `zero.Init` makes torch's constructors round.
        """
        exponents = torch.arange(self.dim // 2, device=positions.device) + int(self.variant == "nemo")
        angles = positions[..., None] * 10_000.0 ** (exponents.double() * (-2 / self.dim))
        return torch.cat((angles.cos(), angles.sin()), dim=-1)

    def formula(
        self,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        weights: dict[str, torch.Tensor],
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bias (B, H, Q, K) of queries at (B, Q) and keys at (B, K) positions, in the dtype of the compression.

        >>> Sandwich(8, dim=2).bias(torch.tensor([2]), torch.arange(3))[0]
        tensor([[-1.4161, -0.4597,  0.0000]])
        """
        compression = weights["compression"]
        products = self.sinusoids(q_positions) @ self.sinusoids(k_positions).mT
        return (products - self.dim / 2).to(compression.dtype)[:, None] / compression[:, None, None]

    def factors(
        self, q_positions: torch.Tensor, k_positions: torch.Tensor, weights: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sinusoids themselves, those of the queries (B, H, Q, dim) divided by the compression; keys (B, 1, K, dim)."""
        compression = weights["compression"]
        f, g = (self.sinusoids(p)[:, None].to(compression.dtype) for p in (q_positions, k_positions))
        return f / compression[:, None, None], g
