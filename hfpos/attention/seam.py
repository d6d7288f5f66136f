"""`Seam`: what acts on queries, keys and logits inside attention. The decoder's hook hands one on in every `Call`.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hfpos.attention.interface import keep_backend, stock_function


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from hfpos.call import Call


class Seam:
    """One way to act inside attention.

    Attributes:
        layers: the layers to act in, as the others keep what they have; None for all.
        backends: the attention implementations that it can stand on.
        absolute: it goes by where tokens stand, not only by how far apart they are.
    """

    layers: frozenset[int] | None = None
    backends: tuple[str, ...] = ("sdpa", "eager")
    absolute: bool = True

    def check_backend(self, decoder: Any) -> None:
        """Make sure that attention still goes through the registered functions."""
        keep_backend(decoder.config, self.backends)

    def check_given(self, mask: torch.Tensor) -> None:
        """Raise `PatchError` for a 4-D mask given to the model that the scheme cannot honour."""

    def best(self, own: str) -> str:
        """The backend for a model whose own attention implementation is `own`, where the user leaves the choice open."""
        return own

    def how(self, backend: str, device: torch.device) -> str:
        """How the scheme gets into attention on `backend` and `device`, and why that way, in words."""
        return f"{backend} on queries and cached keys that are rotated anew, as keys are cached unrotated"

    def gather(self, decoder: Any) -> dict[str, torch.Tensor] | None:
        """The learned weights of all layers, fetched once a forward; None where nothing is learned."""
        return None

    def seam_of(self, module: Any) -> Seam | None:
        """What acts in the layer of an attention `module`; None where its attention stays stock."""
        return self if self.layers is None or module.layer_idx in self.layers else None

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
        """Attention of query (B, H, Q, D) to key, value (B, Hkv, K, D): output (B, Q, H, D) and the weights, if any.

        Args:
            module: the attention module.
            mask: what the mask function of `backend` makes: boolean or additive (B, 1 or H, Q, K), or None.
            call: the positions.
            backend: the attention implementation to stand on.
            options: what the model hands to attention beside these.
        """
        inner = stock_function(backend, module)
        seam = self.seam_of(module)
        if seam is None:
            return inner(module, query, key, value, mask, **options)
        positions = call.q_positions.to(query.device), call.keys_of_layer(key.shape[2]).to(query.device)
        return seam.act(module, query, key, value, mask, positions, call=call, inner=inner, backend=backend, **options)

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
        """As `attend`, with the positions (B, Q) and (B, K) of queries and keys, and the stock function of `backend`."""
        raise NotImplementedError
