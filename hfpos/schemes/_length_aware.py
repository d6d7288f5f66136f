"""What the schemes share whose frequencies follow the current length: `dynamic`, `dynamic_yarn` and `longrope`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hfpos.scheme import Geometry, PatchError, RopeScaling, require_choice
from hfpos.schemes._alone import Alone


@dataclass(frozen=True, kw_only=True)
class LengthAwareRope(Alone, RopeScaling):
    """Base of the scalings that choose their frequencies by length.

    Keys that were cached already rotated cannot follow a change of frequencies; that is why stock implementations give other
    logits when they decode than in a full forward. Here there are two ways, and both decode as they prefill:

    Args:
        cache: `exact` caches keys unrotated. A token at position p sees every key rotated with the frequencies of length p + 1,
            whatever comes behind it, so its logits are a pure function of its prefix. Costs a rotation of all keys for every
            decoded token, and for every prompt token beyond the original length.
            `pinned` fixes one set of frequencies: that of the target length, where `factor` or `target_length` is given (then
            nothing is computed per step and stock Transformers can load it); otherwise that of each row's prompt, kept with
            the cache.

    Without a model, a scheme of the `freq` seam rotates queries and keys when it is called; others are attention, `attend`.

    >>> from hfpos.schemes import Dynamic
    >>> query, key, value = torch.ones(3, 1, 2, 5, 4).unbind()
    >>> Dynamic(original_length=3).attend(query, key, value).shape
    torch.Size([1, 2, 5, 4])
    """

    cache: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.name, "cache", self.cache, ("exact", "pinned"))

    @property
    def seam(self) -> str:
        return "freq" if self.cache == "pinned" and self._target_given else "score"

    @property
    def pins_prompt(self) -> bool:
        """Whether each row keeps the frequencies of its prompt's length."""
        return self.cache == "pinned" and not self._target_given

    @property
    def length_dependent(self) -> bool:
        return self.pins_prompt

    @property
    def _target_given(self) -> bool:
        return self.factor is not None or self.target_length is not None

    def check(self, geometry: Geometry) -> None:
        self.resolved_original(geometry)
        if self._target_given:
            super().check(geometry)

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        inv_freq, scale = self.frequencies_at(geometry, torch.tensor(self.patched_length(geometry)))
        return inv_freq, float(scale)

    def frequencies_at(self, geometry: Geometry, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The frequencies in use at the integer `lengths` (...), in tokens: (..., rotary_dim / 2) and scale (...), float64."""
        raise TypeError(f"{type(self).__name__} does not define its frequencies")

    def check_alone(self) -> None:
        if self.pins_prompt:
            raise PatchError(
                f"{self.name}: with cache='pinned' alone frequencies are pinned to each prompt, which a model's cache remembers; pass factor or "
                "target_length, or cache='exact'"
            )
        if self.seam == "freq":
            raise PatchError(
                f"{self.name}: with cache='pinned' and a target it is one rotation for all; call it with (q, k, positions)"
            )

    def few_sets(self, geometry: Geometry) -> tuple[torch.Tensor, ...] | None:
        """Representative lengths if there are only a few sets of frequencies, else None."""
        return None
