"""Attention within groups of tokens, half of the heads with groups that lie half a group further on: tensors in, tensors out.

With groups of G tokens, heads of the first half see (causally) within [0, G), [G, 2G) ...; the others within [0, G/2), [G/2, 3G/2) ....
Nothing wraps round, and the last group is as long as what is left. Padding in front of a row is left out first, so that a row is cut in
the same way however it was padded, and one that has no more than G tokens is not cut at all. Documents that are packed into one row are
cut with the row. No more than L x G is ever held.

Shapes: B batch, H heads, Hkv key heads, L tokens of a row, D head_dim; n groups of W tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable


class Cut(NamedTuple):
    """Groups of one width, one behind the other.

    Attributes:
        start: the token that the first begins with.
        number: how many there are.
        width: tokens in each.
        mask: (B * number, 1, width, width) boolean, who sees whom; None where causality says all.
    """

    start: int
    number: int
    width: int
    mask: torch.Tensor | None


class Rows(NamedTuple):
    """The rows of a batch that are cut alike.

    Attributes:
        which: the rows; None for all.
        first: the groups of the first half of the heads, the larger one where their number is odd.
        second: those of the other half; None where all heads have the same.
    """

    which: torch.Tensor | None
    first: tuple[Cut, ...]
    second: tuple[Cut, ...] | None


class Groups(NamedTuple):
    """How the rows of one forward are cut. Stands where an attention mask would; a tuple, so that what it holds can be moved along.

    Attributes:
        rows: all of them, once each.
        padding: (B,) int64, the tokens of padding in front of each row; None where there is none.
    """

    rows: tuple[Rows, ...]
    padding: torch.Tensor | None


def group_length(tokens: int, groups: int | None, group_size: int | None) -> int:
    """The length G of a group: `group_size`, or what cuts `tokens` into `groups`, rounded up to an even number.

    >>> group_length(33, 4, None), group_length(33, None, 16)
    (10, 16)
    """
    return group_size or -(-tokens // (2 * (groups or 1))) * 2


def cut_rows(
    size: int,
    shape: tuple[int, int],
    real: torch.Tensor | None,
    sees: Callable | None,
    device: torch.device | str,
) -> Groups:
    """How the rows of a batch are cut.

    Args:
        size: tokens in a group, even.
        shape: B and L.
        real: (B, L) boolean, False where there is padding; None where there is none.
        sees: `(row, head, query, key) -> bool` of index tensors that broadcast, as Transformers' mask functions are; None for causal.
        device: of the tensors.

    Raises:
        PatchError: `sees` shows a query keys behind it.
    """
    batch, length = shape
    padding, short = None, None
    if real is not None:
        counted = real.sum(-1)
        before, behind = real.int().argmax(-1), real.flip(-1).int().argmax(-1)
        spans = torch.where(counted > 0, length - before - behind, 0)
        padding = before if bool(before.any()) else None
        short = spans <= size
        # with padding at the ends only, and what is in front left out, no token sees any
        if sees is not None or bool((spans > counted).any()):
            sees = _without_padding(sees or _causal, real)

    def cuts(which: torch.Tensor | None, spans: list[tuple[int, int, int]]) -> tuple[Cut, ...]:
        known = torch.arange(batch, device=device) if which is None else which
        masks = (None if sees is None else _mask(span, known, padding, length, sees) for span in spans)
        return tuple(Cut(*span, mask) for span, mask in zip(spans, masks, strict=True))

    def uncut(which: torch.Tensor | None) -> Rows:
        return Rows(which, cuts(which, [(0, 1, min(length, size))]), None)

    def halves(which: torch.Tensor | None) -> Rows:
        return Rows(which, *(cuts(which, _spans(length, size, first)) for first in (0, size // 2)))

    if length <= size or (short is not None and bool(short.all())):
        return Groups((uncut(None),), padding)
    if short is None or not bool(short.any()):
        return Groups((halves(None),), padding)
    return Groups((uncut(short.nonzero().flatten()), halves((~short).nonzero().flatten())), padding)


def attend_in_groups(
    groups: Groups,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of query (B, H, L, D) to key, value (B, Hkv, L, D) within groups -> (B, L, H, D); of padding, anything finite.

    Keys and values are shifted with the queries that see them: a key head that queries of both halves share is cut in both ways.

    Args:
        groups: as from `cut_rows`.
        scaling: the factor on the logits; 1 / sqrt(D) unless given.
        dropout: the probability of attention dropout.
    """
    if groups.padding is not None:
        query, key, value = (_rolled(x, groups.padding, 2) for x in (query, key, value))
    parts = []
    for rows in groups.rows:
        q, k, v = (x if rows.which is None else x[rows.which] for x in (query, key, value))
        parts.append(_attend_alike(rows, q, k, v, scaling, dropout))
    output = parts[0]
    if len(parts) > 1:
        order = torch.cat([rows.which for rows in groups.rows if rows.which is not None]).argsort()
        output = torch.cat(parts)[order]
    return output if groups.padding is None else _rolled(output, -groups.padding, 1)


def _spans(length: int, size: int, first: int) -> list[tuple[int, int, int]]:
    """(start, number, width): a group of `first` tokens, those of `size`, and what is left."""
    head = min(first, length)
    number = (length - head) // size
    end = head + number * size
    spans = ((0, 1, head), (head, number, size), (end, 1, length - end))
    return [span for span in spans if span[1] and span[2]]


def _causal(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key <= query


def _without_padding(sees: Callable, real: torch.Tensor) -> Callable:
    return lambda row, head, query, key: sees(row, head, query, key) & real[row, key]


def _mask(
    span: tuple[int, int, int], rows: torch.Tensor, padding: torch.Tensor | None, length: int, sees: Callable
) -> torch.Tensor:
    """(rows * number, 1, width, width). Padding sees itself, so that nothing comes out that is not finite."""
    start, number, width = span
    index = torch.arange(start, start + number * width, device=rows.device).view(1, number, width)
    if padding is not None:
        index = (index + padding[rows][:, None, None]) % length
    row = rows[:, None, None, None]
    seen = sees(row, torch.zeros_like(row), index[..., :, None], index[..., None, :])
    seen = seen.expand(len(rows), number, width, width)
    if bool(seen.triu(1).any()):
        raise PatchError(
            "shifted sparse attention is for causal attention, and here a query sees keys behind it; train without shift_attention"
        )
    return (seen | torch.eye(width, dtype=torch.bool, device=rows.device)).flatten(0, 1)[:, None]


def _rolled(x: torch.Tensor, by: torch.Tensor, dim: int) -> torch.Tensor:
    """Each row of `x` with what stood at `by` of it brought to the front of `dim`, round in a circle."""
    length = x.shape[dim]
    index = (torch.arange(length, device=x.device) + by.to(x.device)[:, None]) % length
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    return x.gather(dim, index.view(shape).expand_as(x))


def _attend_alike(
    rows: Rows,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    heads, length = query.shape[1:3]
    half = heads if rows.second is None else -(-heads // 2)
    parts = [_attend_cuts(rows.first, *_heads(query, key, value, 0, half), scaling, dropout)]
    if rows.second is not None and half < heads:
        parts.append(_attend_cuts(rows.second, *_heads(query, key, value, half, heads), scaling, dropout))
    output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return pad(output, (0, 0, 0, 0, 0, length - output.shape[1])) if output.shape[1] < length else output


def _heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The queries of heads `start` to `stop` and their keys and values: a view, unless the heads share them unevenly."""
    share = query.shape[1] // key.shape[1]
    low, high = start // share, (stop - 1) // share + 1
    each, uneven = divmod(stop - start, high - low)
    if not uneven and all(head // share - low == (head - start) // each for head in range(start, stop)):
        return query[:, start:stop], key[:, low:high], value[:, low:high]
    index = torch.arange(start, stop, device=key.device) // share
    return query[:, start:stop], key.index_select(1, index), value.index_select(1, index)


def _attend_cuts(
    cuts: tuple[Cut, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """(B, tokens that are in a group, H, D)."""
    parts = []
    for cut in cuts:
        q, k, v = (_folded(x, cut) for x in (query, key, value))
        fewer = q.shape[1] > k.shape[1]
        if fewer and not _reads_shared_heads(cut, q, v):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            fewer = False
        part = scaled_dot_product_attention(
            q, k, v, cut.mask, dropout_p=dropout, is_causal=cut.mask is None, scale=scaling, enable_gqa=fewer
        )
        parts.append(part.unflatten(0, (-1, cut.number)).transpose(2, 3).flatten(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _folded(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    """(B, H, L, D) -> (B * n, H, W, D)."""
    within = x[:, :, cut.start : cut.start + cut.number * cut.width]
    return within.unflatten(2, (cut.number, cut.width)).transpose(1, 2).flatten(0, 1)


def _reads_shared_heads(cut: Cut, query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a fast kernel takes fewer key heads than queries; others would write all logits out."""
    if not query.is_cuda:
        return True
    narrow = query.shape[-1] == value.shape[-1] <= 256
    return cut.mask is None and narrow and query.dtype in (torch.float16, torch.bfloat16)
