"""The score seam with a decay that is part of the rotation: xPos.

Logits fall off with the distance through powers of the two positions, which alone would leave every floating format. They are taken relative
to where a block of queries stands: what a query is multiplied by is then near 1, and what a key is multiplied by is a power below 1 that may
vanish, as its logit does. Each block is a call of the model's own attention function. Keys are cached unrotated, so a full forward and
decoding agree. In training each block is computed again in the backward pass, and memory stays linear in the length.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim, R rotary_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from hfpos.attention.blocks import Sight
from hfpos.attention.seam import Seam
from hfpos.attention.sequence_parallel import refuse_ring
from hfpos.attention.turn import Turn
from hfpos.attention.whole_rows import refuse_whole_rows
from hfpos.constant import Constant
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hfpos.call import Call
    from hfpos.scheme import Geometry
    from hfpos.schemes.xpos import XPos

BLOCK = 512  # queries


class DecayedRotation(Seam):
    """Rotates queries and cached keys inside attention, and lets logits decay with the distance.

    Args:
        scheme: gives the decay.
        geometry: of the model.
        convention: how the family pairs dimensions, `half` or `interleaved`.
        layers: those to act in, as the others keep what they have; None for all.
        inv_freq: (R/2,) radians per token.
    """

    def __init__(
        self, scheme: XPos, geometry: Geometry, convention: str, layers: frozenset[int] | None, inv_freq: torch.Tensor
    ) -> None:
        self.scheme = scheme
        self.geometry = geometry
        self.layers = layers
        self.turn = Turn(inv_freq, convention)
        pairs = scheme.decay(geometry).log()  # per token
        both = torch.cat((pairs, pairs)) if convention.startswith("half") else pairs.repeat_interleave(2)
        passed = geometry.head_dim - both.shape[0]  # dimensions that are not rotated do not decay
        self.exact_decay = pad(both, (passed, 0) if convention.endswith("_last") else (0, passed))
        self.decay = Constant(self.exact_decay)
        # what queries of a block may be apart, so that nothing but what vanishes anyway leaves the numbers of a half
        self.reach = scheme.reach(geometry)

    def how(self, backend: str, device: torch.device) -> str:
        return f"{backend} on blocks of queries, with keys that decay towards each, as keys are cached unrotated"

    def act(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        positions: tuple[torch.Tensor, torch.Tensor],
        *,
        call: Call,
        inner: Callable,
        backend: str,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of unrotated query (B, H, Q, D) to unrotated key, value (B, Hkv, K, D): output (B, Q, H, D) and the weights, if any."""
        refuse_ring(call.part, self.scheme.name)
        refuse_whole_rows(self.scheme.name, module, kwargs)
        causal = kwargs.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            raise PatchError(
                f"{self.scheme.name}: {type(module).__name__} lets tokens see those behind them, for which the decay would be a growth; expected "
                "causal attention: use a scheme that knows both directions, such as kerple"
            )
        query, key = (self.turn(x, p, call) for x, p in zip((query, key), positions, strict=True))
        compiling = torch.compiler.is_compiling()
        if compiling and query.shape[2] == key.shape[2]:
            positions = (_without_restarts(positions[0]),) * 2
        again = torch.is_grad_enabled() and not compiling and any(x.requires_grad for x in (query, key, value))
        sight = Sight(mask, query.shape[2] > 1, *positions)
        parts = []
        for columns in self._blocks(positions[0]):
            arguments: tuple = (module, query, key, value, sight, columns, inner, kwargs)
            parts.append(
                checkpoint(self._block, *arguments, use_reentrant=False) if again else self._block(*arguments)
            )
        outputs, weights = zip(*parts, strict=True)
        return torch.cat(outputs, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)

    def _blocks(self, q_positions: torch.Tensor) -> Iterator[slice]:
        """The queries in slices, each of which stands within the reach in every row."""
        queries, size = q_positions.shape[1], min(BLOCK, self.reach)
        waiting = [slice(start, min(start + size, queries)) for start in range(0, queries, size)][::-1]
        while waiting:
            columns = waiting.pop()
            low, high = q_positions[:, columns].aminmax(dim=-1)
            middle = (columns.start + columns.stop) // 2
            # compiled code cannot look at the numbers; `_block` then makes what is too far apart not a number
            if torch.compiler.is_compiling() or middle == columns.start or bool((high - low <= self.reach).all()):
                yield columns
            else:
                waiting += [slice(middle, columns.stop), slice(columns.start, middle)]

    def _block(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sight: Sight,
        columns: slice,
        inner: Callable,
        kwargs: dict,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of the rotated queries in `columns` to the rotated keys that they see."""
        span, mask = sight.of(columns)
        here = sight.q_positions[:, columns]
        low, high = here.aminmax(dim=-1, keepdim=True)
        # what stands farther on than the reach is behind all queries
        away = (low - sight.k_positions[:, span]).clamp(min=-self.reach)
        apart = (here - low).to(torch.float64 if query.dtype == torch.float64 else torch.float32)
        if torch.compiler.is_compiling():
            apart = torch.where(high - low <= self.reach, apart, torch.nan)
        q, k = self._fade(query[:, :, columns], apart), self._fade(key[:, :, span], away)
        output, weights = inner(module, q, k, value[:, :, span], mask, **kwargs)
        if weights is not None:
            weights = pad(weights, (span.start, key.shape[2] - span.stop))
        return output, weights

    def _fade(self, x: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """`x` (B, H, N, D) times the decay over `distance` (B or 1, N)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = self.exact_decay.to(x.device) if wide == torch.float64 else self.decay.on(x.device)
        return (x * (distance[:, None, :, None].to(wide) * decay).exp()).to(x.dtype)


def _without_restarts(positions: torch.Tensor) -> torch.Tensor:
    """Positions (B, N) that go on where those of a packed row start again: distances within a document stay what they are."""
    steps = positions.diff(dim=-1, prepend=positions[:, :1])
    return torch.where(steps < 0, 1, steps).cumsum(-1)
