"""What a live model's positions do to attention, as numbers for a plot: wavelengths, and the weight of each distance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hfpos.attention.learned import LEARNED, weights_of_layer
from hfpos.describe import describe
from hfpos.families import family_of
from hfpos.patching import language_model, record_of
from hfpos.report.results import Pattern
from hfpos.scheme import Bias
from hfpos.schemes._remapping import Remapping
from hfpos.schemes.alibi import Alibi
from hfpos.schemes.xpos import XPos


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfpos.patching import Record

POINTS = 64


def wavelengths(model: nn.Module, length: int) -> tuple[float | None, ...]:
    """Tokens for one turn of each rotated pair when `length` tokens are read, fastest first; None for a pair that stands still."""
    return tuple(2 * math.pi / value if value else None for value in _frequencies(model, length)[0])


def pattern(model: nn.Module, length: int) -> Pattern | None:
    """What is done to the logits of keys 1 to `length` tokens away; None where positions do not act inside attention.

    For a rotation with frequencies f (one a pair) and logit multiplier m it is `m * mean(cos(distance * f))`, the logit of a query and a key
    whose pairs are all alike, with 1 for m = 1 at distance 0, and each pair as it has decayed; for a bias it is what is added to the logit, which is not the same for all heads.
    """
    target = language_model(model)
    distances = np.unique(np.geomspace(1, max(length - 1, 1), POINTS).round().astype(int))
    record = record_of(target)
    scheme = record.scheme if record else Alibi() if describe(model).scheme == "alibi" else None
    if isinstance(scheme, Bias):
        if scheme.reads_query:
            return None  # no curve holds for every query
        bias = _biases(target, scheme, distances, length)
        rows = bias.min(0).values, bias.median(0).values, bias.max(0).values
        return Pattern("bias", tuple(distances.tolist()), *(tuple(row.tolist()) for row in rows))
    if record is not None and record.scheme.seam in ("layers", "stacks"):
        return None  # which are not all alike
    inv_freq, multiplier = _frequencies(model, length)
    if not inv_freq:
        return None
    distances, seen_at = _seen(record, distances, length)
    decay = _decay(record, len(inv_freq))
    by_pair = np.power.outer(decay, seen_at).T * np.cos(np.outer(seen_at, inv_freq))
    curve = tuple((multiplier * by_pair.mean(1)).tolist())
    return Pattern("rotation", tuple(distances.tolist()), curve, curve, curve)


@torch.no_grad()
def _biases(target: PreTrainedModel, scheme: Bias, distances: np.ndarray, length: int) -> torch.Tensor:
    """The bias (layers x heads, distances) of the last of `length` tokens, with the weights that the model has now."""
    family = family_of(target)
    scheme = family.bias_scheme(scheme)
    learned = getattr(family.decoder, LEARNED)(None) if scheme.learned else None
    layers = range(max(len(rows) for rows in learned.values())) if learned else (0,)
    last = torch.tensor([[length - 1]])
    found = []
    for layer in layers:
        weights = scheme.weights(family.geometry())
        if learned:
            weights = weights_of_layer(learned, layer, torch.device("cpu"))
        found.append(scheme.bias(last, last - torch.from_numpy(distances)[None], weights)[0, :, 0])
    return torch.cat(found)


def _seen(record: Record | None, distances: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Those of the `distances` at which the last of `length` tokens sees a key, and how far away it sees that."""
    if record is None or not isinstance(record.scheme, Remapping):
        return distances, distances
    last = torch.tensor([[length - 1]])
    found, seen = record.scheme.distances(record.geometry, last, last - torch.from_numpy(distances)[None])
    kept = seen[0, 0].numpy()
    return distances[kept], found[0, 0].numpy()[kept]


def _decay(record: Record | None, pairs: int) -> np.ndarray:
    """What each rotated pair is multiplied by for every token of distance."""
    if record is None or not isinstance(record.scheme, XPos):
        return np.ones(pairs)
    return record.scheme.decay(record.geometry).numpy()


def _frequencies(model: nn.Module, length: int) -> tuple[list[float], float]:
    """Radians per token of each rotated pair, and the factor on the logits."""
    record = record_of(language_model(model))
    if record is not None and record.scheme.seam == "score":
        scheme: Any = record.scheme
        at_length = hasattr(scheme, "frequencies_at")  # else they are the same at any length
        inv_freq, scale = (
            scheme.frequencies_at(record.geometry, torch.tensor(length))
            if at_length
            else scheme.frequencies(record.geometry)
        )
        return inv_freq.tolist(), float(scale) ** 2
    found = describe(model)
    return [2 * math.pi / wavelength for wavelength in found.wavelengths], found.logit_multiplier
