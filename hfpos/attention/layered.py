"""Layers that act differently: each has a seam of its own, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpos.attention.seam import Seam


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch


class LayeredSeam(Seam):
    """Hands every layer to its own seam.

    Args:
        seams: of each layer; None where the layer's attention stays stock. Layers that act alike share an object.
    """

    def __init__(self, seams: Sequence[Seam | None]) -> None:
        self.seams = tuple(seams)
        self.distinct = [seam for number, seam in enumerate(seams) if seam is not None and seam not in seams[:number]]
        offered = self.distinct[0].backends
        self.backends = tuple(name for name in offered if all(name in seam.backends for seam in self.distinct))
        self.absolute = any(seam.absolute for seam in self.distinct)

    def check_given(self, mask: torch.Tensor) -> None:
        for seam in self.distinct:
            seam.check_given(mask)

    def best(self, own: str) -> str:
        wanted = {seam.best(own) for seam in self.distinct}
        return wanted.pop() if len(wanted) == 1 else own

    def how(self, backend: str, device: torch.device) -> str:
        return "; ".join(
            f"layers {listed(layer for layer, each in enumerate(self.seams) if each is seam)}: {seam.how(backend, device)}"
            for seam in self.distinct
        )

    def gather(self, decoder: Any) -> dict[str, torch.Tensor] | None:
        gathered = (seam.gather(decoder) for seam in self.distinct)
        return next((weights for weights in gathered if weights is not None), None)

    def seam_of(self, module: Any) -> Seam | None:
        seam = self.seams[module.layer_idx]
        return None if seam is None else seam.seam_of(module)


def listed(indices: Iterable[int]) -> str:
    """Layers in words.

    >>> listed([0, 1, 2, 5])
    '0-2, 5'
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
