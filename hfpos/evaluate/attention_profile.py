"""Where a live model's attention looks in real text: the mean weight that queries give to a key, by distance, for each head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hfpos.patching import language_model
from hfpos.probe import eval_mode
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from hfpos.data.documents import TokenizedDocument

DOCUMENTS = 4  # the mean over a thousand queries of these hardly moves with more


@dataclass(frozen=True)
class AttentionProfile:
    """The mean attention weight by distance.

    Attributes:
        length: tokens of the texts that were read; queries are those of their second half.
        distances: the first distance of each bin in tokens, from 0 on; each reaches up to the next, the last one up to `length`.
        heads: for each head of each layer, first layer first, the mean weight of one key in each bin.
        layers: how many layers there are.
    """

    length: int
    distances: tuple[int, ...]
    heads: tuple[tuple[float, ...], ...]
    layers: int

    def mean(self) -> tuple[float, ...]:
        """The mean over all heads, for each bin.

        >>> AttentionProfile(4, (0, 1), ((0.5, 0.25), (0.75, 0.25)), 1).mean()
        (0.625, 0.25)
        """
        return tuple(sum(column) / len(self.heads) for column in zip(*self.heads, strict=True))


@torch.no_grad()
def attention_profile(model: nn.Module, documents: Sequence[TokenizedDocument], length: int) -> AttentionProfile:
    """Measure where attention looks in the first `length` tokens of the first few documents that have them.

    The weights are those of eager attention; they are held for one document at a time, layers x heads x length x length of them.

    Args:
        model: a causal language model, patched or not; its mode and its attention implementation are put back.
        documents: token ids.
        length: in tokens, 2 or more.

    Raises:
        PatchError: no document is that long, or the model gives no attention weights.
    """
    rows = [document.ids[:length] for document in documents if len(document.ids) >= length][:DOCUMENTS]
    if length < 2 or not rows:
        longest = max((len(document.ids) for document in documents), default=0)
        raise PatchError(
            f"attention={length} is not usable; expected 2 tokens or more, and no more than the longest document has: {longest}"
        )
    target: Any = language_model(model)
    device = target.get_input_embeddings().weight.device
    edges = _edges(length)
    place = torch.arange(length, device=device)
    distance = place[length // 2 :, None] - place  # of keys behind the query it is negative
    bins = torch.bucketize(distance, torch.tensor(edges, device=device), right=True)  # 0 for those
    counts = torch.bincount(bins.flatten(), minlength=len(edges) + 1)
    totals = torch.zeros((), device=device)
    with eval_mode(target), attention_by(target, "eager"):
        for row in rows:
            weights = target(input_ids=row[None].to(device), output_attentions=True, use_cache=False).attentions
            totals = totals + _by_bin(weights, bins, len(counts), type(target).__name__)
    mean = (totals / len(rows) / counts)[:, 1:]
    return AttentionProfile(length, tuple(edges), tuple(map(tuple, mean.tolist())), len(weights))


def _by_bin(weights: Any, bins: torch.Tensor, size: int, name: str) -> torch.Tensor:
    """The sums (layers x heads, bins) of the weights, each (1, H, L, L), of the queries of the second half; float64."""
    if not weights or any(each is None for each in weights):
        raise PatchError(
            f"{name} gives no attention weights; leave attention= out, or use a scheme whose weights eager attention can give"
        )
    found = []
    for each in weights:
        late = each[0, :, -bins.shape[0] :].double().flatten(1)
        found.append(late.new_zeros(late.shape[0], size).index_add_(1, bins.flatten(), late))
    return torch.cat(found)


def _edges(length: int) -> list[int]:
    """The first distances of the bins: single ones at first, then four to an octave.

    >>> _edges(16)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14]
    """
    steps = (round(2 ** (quarter / 4)) for quarter in range(4 * length.bit_length()))
    edges = sorted({*range(min(length, 8)), *(2 * step for step in steps if 2 * step >= 8)})
    return [edge for edge in edges if edge < length]


@contextlib.contextmanager
def attention_by(model: nn.Module, implementation: str) -> Iterator[None]:
    """Let every part of the model attend by `implementation`; a scheme in it stays."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in model.modules())}
    # outer ones first, as they set those inside them too
    before = [
        (config, config._attn_implementation) for config in configs.values() if isinstance(config, PreTrainedConfig)
    ]
    try:
        for config, _ in before:
            config._attn_implementation = implementation
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
