"""ReRoPE and leaky ReRoPE."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hfpos.scheme import Geometry, PatchError, require_flag, require_length, require_number
from hfpos.schemes._remapping import Branch, Remapping


@dataclass(frozen=True, kw_only=True)
class ReRope(Remapping):
    """Rectified RoPE: keys fewer than `window` tokens away are seen at their own distance, all others at the distance `window`.

    With a finite `factor` (leaky ReRoPE) the distance goes on growing behind the window, `factor` times as slowly:
    `window + (i - j - window) / factor`. Queries are multiplied by `max(1, ln(i + 1) / ln(original_length))`, which keeps attention as sharp
    among many keys as among those of the pretraining. Frequencies stay those of the pretraining, nothing is trained, and a text no longer
    than the window and the original length is what it was.

    Source: Jianlin Su, kexue.fm/archives/9708, and github.com/bojone/rerope; there is no paper. Other than the authors' scripts, the port in
    the YaRN repository needs texts longer than the window.

    Args:
        window: tokens that are seen at their own distance; an eighth of the original length unless given, as in the author's scripts
            (512 of 4,096; the figures in his README are for 1,024).
        factor: how many times more slowly distances grow behind the window, >= 1; infinite: not at all.
        log_scaling: multiply queries by the logarithm of their position; without it this is a different method.
        target_length: what the config is to allow, in tokens. With an infinite factor any length works; a finite one reaches
            `window + (original_length - window) * factor`.
        original_length: context length of the pretraining, in tokens; read from the model unless given.

    >>> model = Geometry(heads=8, head_dim=4, rotary_dim=4, theta=10000.0, trained_length=4096, allowed_length=4096)
    >>> last, keys = torch.tensor([[8000]]), torch.tensor([[8000, 7900, 7488, 0]])
    >>> ReRope().distances(model, last, keys)[0]
    tensor([[[  0., 100., 512., 512.]]], dtype=torch.float64)
    >>> ReRope(factor=16, window=1024).patched_length(model)
    50176
    >>> query, key, value = torch.ones(3, 1, 2, 5, 4).unbind()
    >>> ReRope(window=3, original_length=4)(query, key, value).shape
    torch.Size([1, 2, 5, 4])
    """

    name = "rerope"
    paper = "kexue.fm/archives/9708"
    summary = "near keys at their own distance, all others at one; without training"

    window: int | None = None
    factor: float = math.inf
    log_scaling: bool = True

    def __post_init__(self) -> None:
        for name in ("window", "target_length", "original_length"):
            if getattr(self, name) is not None:
                require_length(self.name, name, getattr(self, name))
        if self.factor == "inf":  # as JSON and the command line have it
            object.__setattr__(self, "factor", math.inf)
        if self.factor != math.inf:
            require_number(self.name, "factor", self.factor, least=1)
        require_flag(self.name, "log_scaling", self.log_scaling)

    def parameters(self) -> dict[str, Any]:
        return super().parameters() | ({"factor": "inf"} if self.factor == math.inf else {})

    def check(self, geometry: Geometry) -> None:
        original, window = self.resolved_original(geometry), self.resolved_window(geometry)
        if window > original:
            raise PatchError(
                f"{self.name}: window={window} is longer than the original length of {original} tokens, so distances would be seen that the "
                f"model was not trained with; pass a window below it, e.g. {max(original // 8, 1)}"
            )
        if self.factor == 1 and not self.log_scaling:
            raise PatchError(f"{self.name}: factor=1 without log_scaling changes nothing; expected a factor above 1")
        reached = self._reach(geometry)
        if self.target_length is not None and self.target_length > reached:
            raise PatchError(
                f"{self.name}: factor={self.factor:g} with a window of {window} reaches {reached} tokens, not the target of "
                f"{self.target_length}; pass a larger factor, or none for any length"
            )

    def patched_length(self, geometry: Geometry) -> int | None:  # type: ignore[override]
        if self.target_length is not None:
            return self.target_length
        return geometry.allowed_length if self.factor == math.inf else int(self._reach(geometry))

    def resolved_window(self, geometry: Geometry) -> int:
        """How many tokens are seen at their own distance."""
        return self.window if self.window is not None else max(self.resolved_original(geometry) // 8, 1)

    def branches(self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor) -> tuple[Branch, ...]:
        window = self.resolved_window(geometry)
        edge = queries - window + 1
        if self.factor == math.inf:
            far = Branch(None, edge, torch.full_like(queries, window), torch.zeros_like(keys))
        else:
            start = window - window / self.factor
            far = Branch(None, edge, queries.double() / self.factor + start, keys.double() / self.factor)
        return Branch(edge, None, queries, keys), far

    def unchanged(self, geometry: Geometry, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        near = (queries.amax(-1) - keys.amin(-1) < self.resolved_window(geometry)).all()
        return near & (queries.amax() < self.resolved_original(geometry)) if self.log_scaling else near

    def query_factor(self, geometry: Geometry, queries: torch.Tensor) -> torch.Tensor | None:
        if not self.log_scaling:
            return None
        original = self.resolved_original(geometry)
        return ((queries + 1).double().log() / math.log(original)).clamp(min=1)

    def _reach(self, geometry: Geometry) -> float:
        """Tokens whose farthest distance is the original length."""
        window = self.resolved_window(geometry)
        left = self.resolved_original(geometry) - window
        return math.inf if self.factor == math.inf else window + math.floor(left * self.factor)
