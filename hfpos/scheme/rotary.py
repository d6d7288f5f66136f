"""The bases of the schemes that rotate queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfpos.scheme.alone import rotated
from hfpos.scheme.base import Scheme
from hfpos.scheme.errors import PatchError, require_length, require_number


if TYPE_CHECKING:
    import torch

    from hfpos.scheme.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class Rope(Scheme):
    """Base of every scheme that rotates queries and keys.

    Attention sees `scale**2 * <R(i f) q, R(j f) k>` with `f` the frequencies in radians per token and `scale` the factor
    that cos and sin are multiplied by.
    """

    @property
    def seam(self) -> str:
        return "freq"

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        """`(inv_freq, attention_scale)`: (rotary_dim / 2,) float64 radians per token, and the factor on cos and sin."""
        raise TypeError(f"{type(self).__name__} does not define its frequencies")

    def stock(self, geometry: Geometry) -> dict[str, Any] | None:
        """The same as a `rope_parameters` dict that Transformers itself understands; None if it has no such type."""
        return None

    def base_theta(self, geometry: Geometry) -> float:
        """The rotary base that the scheme starts from."""
        return geometry.theta

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        positions: torch.Tensor,
        *,
        theta: float = 10_000.0,
        rotary_dim: int | None = None,
        convention: str = "half",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys, without a model: for those who write their own attention.

        Args:
            q: (..., H, Q, D) floats of any dtype, which is also that of the result; computed in float32 or wider.
            k: (..., Hkv, Q, D), with as many heads as it likes.
            positions: (Q,) or (B, Q) integers or floats, in tokens; for (B, Q), q and k are (B, H, Q, D).
            theta: the base of the unscaled frequencies, unless the scheme has one of its own.
            rotary_dim: how many of the first dimensions of a head turn, even; all unless given.
            convention: `half` pairs dimension i with i + rotary_dim / 2 (LLaMA, GPT-NeoX), `interleaved` 2i with 2i + 1 (GPT-J).

        Returns:
            q and k rotated, in their shapes and dtypes. A temperature of the scheme (YaRN's) is in both.

        Raises:
            PatchError: shapes that do not fit; `original_length` was not given and is needed; a scheme of the score seam.

        >>> import torch
        >>> from hfpos.schemes import Rotary
        >>> q = k = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # one head, two tokens
        >>> Rotary()(q, k, torch.tensor([0, 1]))[0]
        tensor([[[1.0000, 0.0000],
                 [0.5403, 0.8415]]])
        """
        return rotated(self, q, k, positions, theta=theta, rotary_dim=rotary_dim, convention=convention)


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Rope):
    """Base of the RoPE scalings: how far to extend is `factor` or `target_length`, never both.

    Args:
        factor: the ratio of the target to the original length, >= 1.
        target_length: the context length wanted, in tokens.
        original_length: context length of the pretraining, in tokens; read from the model unless given.
    """

    factor: float | None = None
    target_length: int | None = None
    original_length: int | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and self.target_length is not None:
            raise PatchError(
                f"{self.name}: both factor={self.factor!r} and target_length={self.target_length!r} were given; "
                "give one of them (target_length = factor * original_length)"
            )
        if self.factor is not None:
            require_number(self.name, "factor", self.factor, least=1)
        if self.target_length is not None:
            require_length(self.name, "target_length", self.target_length)
        if self.original_length is not None:
            require_length(self.name, "original_length", self.original_length)

    def check(self, geometry: Geometry) -> None:
        if self.factor is None and self.target_length is None:
            raise PatchError(
                f"{self.name}: how far to extend is not given; pass factor= (e.g. 4) or target_length= (tokens)"
            )
        factor, original = self.resolved_factor(geometry), self.resolved_original(geometry)
        if factor < 1:
            raise PatchError(
                f"{self.name}: target_length={self.target_length} is shorter than the original length {original}; "
                "a scaling extends the context: pass a target_length above it"
            )

    def resolved_original(self, geometry: Geometry) -> int:
        """The pretraining length in tokens: `original_length`, else the model's own. A conflict raises."""
        given, trained, allowed = self.original_length, geometry.trained_length, geometry.allowed_length
        if given is None:
            if trained is None:
                why = geometry.length_problem or "the model's config does not state a context length"
                raise PatchError(
                    f"{self.name}: {why}; pass original_length= (the length it was pretrained at, in tokens)"
                )
            return trained
        stated = trained if geometry.trained_length_stated else None
        if (stated is not None and given != stated) or (allowed is not None and given > allowed):
            found = (
                f"original_max_position_embeddings={stated}"
                if stated is not None
                else f"max_position_embeddings={allowed}"
            )
            raise PatchError(
                f"{self.name}: original_length={given} conflicts with {found} of the model's config; leave original_length "
                "out to take the model's, or correct the config before the model is built"
            )
        return given

    def resolved_factor(self, geometry: Geometry) -> float:
        """The scale `s` = target length / original length."""
        if self.factor is not None:
            return float(self.factor)
        if self.target_length is None:
            return 1.0
        return self.target_length / self.resolved_original(geometry)

    def patched_length(self, geometry: Geometry) -> int:
        if self.target_length is not None:
            return self.target_length
        return round(self.resolved_factor(geometry) * self.resolved_original(geometry))
