"""StreamingLLM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfpos.scheme import Geometry
from hfpos.schemes._sinks import Sinks


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Sinks):
    """StreamingLLM: a query sees the last `window` tokens, itself among them, and the first `sinks`, as if nothing had been between.

    Positions are those in a cache that holds nothing else: the query at position i is rotated by `min(i, sinks + window - 1)` and the
    sink at position j by j. What lies between is not seen and not computed, so time grows with the length times the window; it does
    stay in the cache, so that documents may be packed and a cache be cropped. Frequencies stay those of the pretraining, nothing
    is trained, any length works, and a text no longer than the window is what it was.

    Paper: arXiv 2309.17453. In the authors' code the query's own token is counted beside the `recent_size`: window = recent_size + 1.

    Args:
        window: tokens seen at their own distance; what the sinks leave of the original length unless given, as in the paper.
        sinks: tokens at the beginning that are always seen; the authors found 4 to be enough.
        factor, target_length: what the config is to allow; as it is unless one of them is given.
        original_length: context length of the pretraining, in tokens; read from the model unless given.

    >>> model = Geometry(heads=8, head_dim=4, rotary_dim=4, theta=10000.0, trained_length=8, allowed_length=8)
    >>> last, keys = torch.tensor([[20]]), torch.tensor([[0, 1, 2, 14, 15, 20]])
    >>> StreamingLLM(sinks=2).distances(model, last, keys)[0]
    tensor([[[7., 6., nan, nan, 5., 0.]]], dtype=torch.float64)
    >>> query, key, value = torch.ones(3, 1, 2, 9, 4).unbind()
    >>> StreamingLLM(original_length=8)(query, key, value).shape
    torch.Size([1, 2, 9, 4])
    """

    name = "streaming_llm"
    paper = "arXiv 2309.17453"
    summary = "the last tokens and the first ones, as if nothing had been between; without training"

    def sink_places(
        self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return queries.clamp(max=self.sinks + self.resolved_window(geometry) - 1), keys

    def _longest(self, original: int) -> int:
        return original - self.sinks
