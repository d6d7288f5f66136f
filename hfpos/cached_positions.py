"""Where the keys in a cache stand, kept with the cache itself, so that it survives cropping, beam search, sliding windows and static caches.

Shapes: B batch (1 where all rows are alike), K keys seen so far.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hfpos.scheme import PatchError


# The attribute of a cache under which the positions (and the pinned prompt lengths) of its keys are kept.
CACHE_RECORD = "hfpos_record"


class CacheRecord(NamedTuple):
    """What is remembered with a cache: the positions of its keys and, for pinned schemes, each row's prompt length."""

    k_positions: torch.Tensor
    lengths: torch.Tensor | None


def prompt_lengths(positions: torch.Tensor, past: Any, record: CacheRecord | None, batch: int) -> torch.Tensor:
    """The length (B, 1) of each row's prompt, which is what an empty cache is filled with first."""
    lengths = positions.amax(-1, keepdim=True) + 1
    if record is None or record.lengths is None or (isinstance(past, int) and past == 0):
        return lengths
    known = _rows(record.lengths, batch).to(positions.device)
    return torch.where(past == 0, lengths, known) if isinstance(past, torch.Tensor) else known


def key_positions(
    positions: torch.Tensor, mask: Any, cache: Any, past: Any, record: CacheRecord | None, batch: int
) -> tuple[torch.Tensor, int | torch.Tensor]:
    """Positions (B, K) of all keys, those the cache was filled with and those of this call, and how many they are."""
    tokens = positions.shape[-1]
    # A static cache has room for keys to come. One whose first layer slides counts in Python, though, and needs no room here.
    if not getattr(cache, "is_compileable", False) or cache.is_sliding[0]:
        if cache is None or (isinstance(past, int) and past == 0):
            return positions, tokens
        before = _known(record, mask, past, batch, positions.device)[:, :past]
        rows = max(before.shape[0], positions.shape[0])
        return torch.cat((before.expand(rows, -1), positions.expand(rows, -1)), dim=-1), past + tokens
    before = _known(record, mask, cache.get_max_length(), batch, positions.device)
    rows = max(before.shape[0], positions.shape[0])
    index = torch.arange(tokens, device=positions.device) + past
    return before.expand(rows, -1).index_copy(1, index, positions.expand(rows, -1)), index[-1] + 1


def _known(record: CacheRecord | None, mask: Any, length: int, batch: int, device: torch.device) -> torch.Tensor:
    """Positions (B, >= length) of the cached keys. A cache that was filled elsewhere is taken to hold consecutive tokens."""
    if record is not None and record.k_positions.shape[-1] >= length:
        return _rows(record.k_positions, batch).to(device)
    if mask is not None and mask.shape[-1] >= length:
        return (mask.to(device).long().cumsum(-1) - 1).clamp(min=0)
    return torch.arange(length, device=device)[None]


def _rows(recorded: torch.Tensor, batch: int) -> torch.Tensor:
    """The record's rows for a batch that may have been widened since, as beam search and `num_return_sequences` do."""
    rows = recorded.shape[0]
    if rows in (1, batch):
        return recorded
    if batch % rows:
        raise PatchError(
            f"the cache was filled with a batch of {rows} rows and is now used with {batch}; expected the same rows, or each of them "
            "repeated equally often"
        )
    return recorded.repeat_interleave(batch // rows, dim=0)
