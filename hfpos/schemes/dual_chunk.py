"""Dual chunk attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfpos.scheme import Geometry, PatchError, require_length
from hfpos.schemes._remapping import Branch, Remapping


@dataclass(frozen=True, kw_only=True)
class DualChunk(Remapping):
    """Dual chunk attention (DCA): a text is cut into chunks, and what a query sees depends on how many chunks away a key is.

    With `s = chunk_size`, `w = local` and `c = s + w`, a key at position j is rotated by `j mod s`, and the query at position i by
    `i mod s` for keys of its own chunk, by `min(s + i mod s, c - 1)` for those of the chunk before, and by `c - 1` for all earlier ones. So
    the `w` nearest tokens keep their distance across the border of two chunks, and no distance exceeds `c - 1`. Frequencies stay those of
    the pretraining, nothing is trained, any length works, and a text no longer than a chunk is what it was.

    Paper: arXiv 2402.17463, where c is the original length. What the authors' code calls a chunk_size of X (3/4 of the original length) and
    a local window of Y (1/16 to 1/8 of it) is `chunk_size=X - Y, local=Y + 1` here.

    Args:
        chunk_size: s, in tokens; three quarters of the original length unless given, or what `local` leaves of it.
        local: w, in tokens; what the chunk leaves of the original length unless given.
        factor, target_length: what the config is to allow; as it is unless one of them is given.
        original_length: context length of the pretraining, in tokens; read from the model unless given.

    >>> model = Geometry(heads=8, head_dim=4, rotary_dim=4, theta=10000.0, trained_length=10, allowed_length=10)
    >>> scheme = DualChunk(chunk_size=6, local=4)
    >>> distance, _ = scheme.distances(model, torch.tensor([[11]]), torch.arange(12)[None])
    >>> distance.int()
    tensor([[[9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0]]], dtype=torch.int32)
    >>> query, key, value = torch.ones(3, 1, 2, 12, 4).unbind()
    >>> DualChunk(original_length=8)(query, key, value).shape
    torch.Size([1, 2, 12, 4])
    """

    name = "dual_chunk"
    aliases = ("dca",)
    paper = "arXiv 2402.17463"
    summary = "positions counted anew in every chunk, other chunks at trained distances; without training"

    chunk_size: int | None = None
    local: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk_size", "local"):
            if getattr(self, name) is not None:
                require_length(self.name, name, getattr(self, name))

    def check(self, geometry: Geometry) -> None:
        super().check(geometry)
        original = self.resolved_original(geometry)
        chunk, local = self.resolved_chunk(geometry), self.resolved_local(geometry)
        if chunk < 1 or local < 1 or chunk + local > original:
            given = ", ".join(
                f"{n}={getattr(self, n)}" for n in ("chunk_size", "local") if getattr(self, n) is not None
            )
            raise PatchError(
                f"{self.name}: {given or 'the default'} does not fit the original length of {original} tokens; expected chunk_size + local of at "
                f"most that, each at least 1, e.g. chunk_size={max(3 * original // 4, 1)}"
            )
        if local > chunk:
            raise PatchError(
                f"{self.name}: local={local} is longer than a chunk of {chunk} tokens, and only the chunk before is seen at its own "
                "distances; expected a local of at most chunk_size"
            )

    def resolved_chunk(self, geometry: Geometry) -> int:
        """Tokens of a chunk."""
        if self.chunk_size is not None:
            return self.chunk_size
        original = self.resolved_original(geometry)
        return 3 * original // 4 if self.local is None else original - self.local

    def resolved_local(self, geometry: Geometry) -> int:
        """How many tokens are seen at their own distance across the border of two chunks."""
        return self.resolved_original(geometry) - self.resolved_chunk(geometry) if self.local is None else self.local

    def branches(self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor) -> tuple[Branch, ...]:
        chunk, farthest = (
            self.resolved_chunk(geometry),
            self.resolved_chunk(geometry) + self.resolved_local(geometry) - 1,
        )
        inner, key = queries % chunk, keys % chunk
        start = queries - inner
        return (
            Branch(start, None, inner, key),
            Branch(start - chunk, start, (inner + chunk).clamp(max=farthest), key),
            Branch(None, start - chunk, torch.full_like(queries, farthest), key),
        )

    def unchanged(self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return queries.amax() < self.resolved_chunk(geometry)
