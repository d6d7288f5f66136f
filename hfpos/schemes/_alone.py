"""What lets a scheme of the score seam be attention without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import torch


class Alone:
    """Makes a scheme a function of queries, keys and values, for people who write their own attention."""

    def check_alone(self) -> None:
        """Raise `PatchError` where these parameters mean nothing without a model."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        theta: float = 10_000.0,
        rotary_dim: int | None = None,
        convention: str = "half",
    ) -> torch.Tensor:
        """Causal attention under this scheme, differentiable, in memory linear in the length: the output (B, H, Q, D).

        Args:
            query: (B, H, Q, D), not rotated; the last Q of the K tokens.
            key, value: (B, Hkv, K, D), keys not rotated; H is a multiple of Hkv. All three of one floating dtype.
            positions: (K,) or (B, K) integer, where all K tokens stand; 0 .. K - 1 unless given.
            theta: the base of the unscaled frequencies.
            rotary_dim: how many of the first dimensions of a head turn, even; all unless given.
            convention: `half` pairs dimension i with i + rotary_dim / 2, `interleaved` 2i with 2i + 1.

        Raises:
            PatchError: shapes, dtypes or positions that do not fit, or a length that the scheme needs and was not given.
        """
        from hfpos.attention.alone import attend_alone  # the engine of attention, which a scheme itself does without

        self.check_alone()
        return attend_alone(
            self, query, key, value, positions, theta=theta, rotary_dim=rotary_dim, convention=convention
        )
