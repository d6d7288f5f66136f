"""Rotation by fixed frequencies inside attention, for families that rotate nothing themselves: keys are cached unrotated.

Nothing but `<R(i f) q, R(j f) k>` with the positions of the two, so it holds in both directions, and any mask is the model's own business.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim, R rotary_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfpos.attention.seam import Seam
from hfpos.attention.sequence_parallel import refuse_ring
from hfpos.constant import Constant
from hfpos.rotation import cos_sin, rotate
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.call import Call

    Table = tuple[torch.Tensor, torch.Tensor]


class FixedRotation(Seam):
    """Rotates queries and keys where a family calls Transformers' attention interface.

    Args:
        inv_freq: (R/2,) radians per token; best in float64, which float64 queries are then rotated with.
        scale: the factor on cos and sin.
        convention: which dimensions are paired, `half` or `interleaved`.
        layers: those to rotate in, as the others keep what they have; None for all.

    >>> rotation = FixedRotation(torch.tensor([1.0]))
    >>> rotation.turn(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[1]]), {})
    tensor([[[[0.5403, 0.8415]]]])
    """

    absolute = False

    def __init__(
        self,
        inv_freq: torch.Tensor,
        scale: float = 1.0,
        convention: str = "half",
        layers: frozenset[int] | None = None,
    ) -> None:
        self.exact = inv_freq.detach().to("cpu", torch.float64)
        self.inv_freq = Constant(self.exact)
        self.scale = scale
        self.convention = convention
        self.layers = layers

    def turn(self, x: torch.Tensor, positions: torch.Tensor, memo: dict[Any, Any]) -> torch.Tensor:
        """Queries or keys `x` (B, H, N, D) rotated by their `positions` (B or 1, N), in the dtype of `x`.

        Args:
            memo: lives as long as the forward, whose layers share cos and sin.
        """
        cos, sin = self._table(positions, x, memo)
        return rotate(x, cos, sin, self.convention)

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
        memo = {} if call.memo is None else call.memo.known
        query, key = (self.turn(x, p, memo) for x, p in zip((query, key), positions, strict=True))
        return inner(module, query, key, value, mask, **options)

    def _table(self, positions: torch.Tensor, x: torch.Tensor, memo: dict[Any, Any]) -> Table:
        """cos and sin, each (B or 1, 1, N, R/2); a table of this forward's that has been made already is taken from the memo."""
        wide = x.dtype == torch.float64
        known = ("rotation", id(self), id(positions), wide)
        if known not in memo:
            inv_freq = self.exact.to(x.device) if wide else self.inv_freq.on(x.device)
            table = cos_sin(positions, inv_freq, self.scale)
            # with the positions themselves: while they are kept, their id is their own
            memo[known] = (table[0][:, None], table[1][:, None]), positions
        return memo[known][0]
