"""Layers that act differently: each has a seam of its own, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpos.attention.interface import stock_function
from hfpos.attention.seam import Seam


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from hfpos.call import Call


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
            f"{_listed([layer for layer, each in enumerate(self.seams) if each is seam])}: {seam.how(backend, device)}"
            for seam in self.distinct
        )

    def gather(self, decoder: Any) -> dict[str, torch.Tensor] | None:
        gathered = (seam.gather(decoder) for seam in self.distinct)
        return next((weights for weights in gathered if weights is not None), None)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        *,
        call: Call,
        backend: str,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention as the layer's own seam has it."""
        seam = self.seams[module.layer_idx]
        if seam is None:
            return stock_function(backend, module)(module, query, key, value, mask, **options)
        return seam.attend(module, query, key, value, mask, call=call, backend=backend, **options)

    def act(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        positions: tuple[torch.Tensor, torch.Tensor],
        *,
        call: Call,
        inner: Callable,
        backend: str,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Not called: `attend` hands on before positions are looked up."""
        raise NotImplementedError


def _listed(layers: Sequence[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
