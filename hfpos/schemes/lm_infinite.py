"""LM-Infinite."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfpos.scheme import Geometry
from hfpos.schemes._sinks import Sinks


@dataclass(frozen=True, kw_only=True)
class LMInfinite(Sinks):
    """LM-Infinite: a query sees the last `window` tokens, itself among them, and the first `sinks`, these at the distance `window` at most.

    What lies between is not seen and not computed, so time grows with the length times the window. Frequencies stay those of the
    pretraining, nothing is trained, any length works, and a text no longer than the window is what it was.

    Paper: LM-Infinite, arXiv 2308.16137. As in the authors' `convert_llama_model`, the ceiling of the distance is the window.

    Args:
        window: tokens seen at their own distance; the original length unless given, as in the paper.
        sinks: tokens at the beginning that are always seen; the authors found 10 to 100 to do alike.
        factor, target_length: what the config is to allow; as it is unless one of them is given.
        original_length: context length of the pretraining, in tokens; read from the model unless given.

    >>> model = Geometry(heads=8, head_dim=4, rotary_dim=4, theta=10000.0, trained_length=8, allowed_length=8)
    >>> last, keys = torch.tensor([[20]]), torch.tensor([[0, 1, 2, 12, 13, 20]])
    >>> LMInfinite(sinks=2).distances(model, last, keys)[0]
    tensor([[[8., 8., nan, nan, 7., 0.]]], dtype=torch.float64)
    >>> query, key, value = torch.ones(3, 1, 2, 9, 4).unbind()
    >>> LMInfinite(window=4, original_length=8)(query, key, value).shape
    torch.Size([1, 2, 9, 4])
    """

    name = "lm_infinite"
    paper = "arXiv 2308.16137"
    summary = "the last tokens and the first ones, no farther than trained; without training"

    sinks: int = 10

    def sink_places(
        self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full_like(queries, self.resolved_window(geometry)), torch.zeros_like(keys)
