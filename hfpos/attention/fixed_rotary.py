"""Rotation by fixed frequencies inside attention, for families that rotate nothing themselves: keys are cached unrotated.

Nothing but `<R(i f) q, R(j f) k>` with the positions of the two, so it holds in both directions, and any mask is the model's own business.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim, R rotary_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpos.attention.seam import Seam
from hfpos.attention.sequence_parallel import refuse_ring
from hfpos.attention.turn import Turn
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hfpos.call import Call


class FixedRotation(Seam):
    """Rotates queries and keys where a family calls Transformers' attention interface.

    Args:
        inv_freq: (R/2,) radians per token; best in float64, which float64 queries are then rotated with.
        scale: the factor on cos and sin.
        convention: which dimensions are paired, `half` or `interleaved`.
        layers: those to rotate in, as the others keep what they have; None for all.
    """

    absolute = False

    def __init__(
        self,
        inv_freq: torch.Tensor,
        scale: float = 1.0,
        convention: str = "half",
        layers: frozenset[int] | None = None,
    ) -> None:
        self.turn = Turn(inv_freq, convention, scale)
        self.layers = layers

    def how(self, backend: str, device: torch.device) -> str:
        return f"{backend} on queries and keys that are rotated there, as the family has no rotation of its own"

    def act(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        positions: tuple[torch.Tensor, torch.Tensor],
        *,
        call: Call,
        inner: Callable,
        backend: str,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of unrotated query (B, H, Q, D) to unrotated key, value (B, Hkv, K, D): output (B, Q, H, D) and the weights, if any."""
        refuse_ring(call.part, "a rotation inside attention")
        if options.get("cache") is not None:
            raise PatchError(
                f"{type(module).__name__} was called with a paged cache (continuous batching), which does not tell a rotation inside attention "
                "where its keys stand; generate without it"
            )
        query, key = (self.turn.as_stock(x, p, call) for x, p in zip((query, key), positions, strict=True))
        return inner(module, query, key, value, mask, **options)
