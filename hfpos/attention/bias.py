"""The bias seam: adds a scheme's bias to the logits, without a dense bias tensor wherever it can.

| the call | how |
|---|---|
| one query | a row of the bias, handed to SDPA as its mask |
| `sdpa`, no mask, on a CPU; a bias that does not separate | blocks of queries (`blocks.py`), the bias a view where it can be |
| `sdpa`, else, of a bias that separates | extra dimensions of queries and keys (`separable.py`) |
| `flex_attention`; `auto` on a GPU, of a bias that does not separate | flex_attention (`flex.py`) |
| `flash_attention_2` | its own ALiBi, or extra dimensions (`flash.py`) |
| `eager`; attention weights wanted | the bias written out: the reference |

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfpos.attention.blocks import Sight, block_attention
from hfpos.attention.dense import add_bias, bias_of, full_mask
from hfpos.attention.distances import Distances
from hfpos.attention.flash import flash_alibi, flash_attention
from hfpos.attention.flex import biased_flex_attention, refuse_flex
from hfpos.attention.interface import is_fused, stock_function
from hfpos.attention.learned import LEARNED, weights_of_layer
from hfpos.attention.masks import check_mask, refuse_numbers
from hfpos.attention.seam import Seam
from hfpos.attention.separable import WIDEST, fits, separable_attention
from hfpos.attention.sequence_parallel import ShareOfHeads, heads_seen, refuse_ring
from hfpos.constant import Constant
from hfpos.scheme import PatchError
from hfpos.schemes.alibi import Alibi


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.attention.sequence_parallel import Part
    from hfpos.positions import Call
    from hfpos.scheme import Bias, Geometry


class BiasedAttention(Seam):
    """Attention with a bias.

    Args:
        scheme: gives the bias.
        geometry: of the model.
    """

    def __init__(self, scheme: Bias, geometry: Geometry) -> None:
        self.scheme = scheme
        self.heads = geometry.heads
        self.exact = scheme.weights(geometry)
        self.constants = {name: Constant(value) for name, value in self.exact.items()}
        place = torch.zeros(1, 1, dtype=torch.int64)
        factors = scheme.factors(place, place, self.exact)
        self.separable = factors is not None
        # so few dimensions more that they cost less than a bias written out, on any kernel
        self.narrow = factors is not None and factors[0].shape[-1] == 1
        self.absolute = not (scheme.relative or scheme.reads_query)
        self.backends = ("auto", "sdpa", "eager")
        if scheme.relative:
            self.backends += ("flex_attention",)
        if self.separable:
            self.backends += ("flash_attention_2",)

    def check_given(self, mask: torch.Tensor) -> None:
        refuse_numbers(self.scheme, mask)

    def best(self, own: str) -> str:
        return "auto" if own == "sdpa" and self.scheme.relative and not self.narrow else own

    def how(self, backend: str, device: torch.device) -> str:
        extra = "extra dimensions of q and k"
        if backend == "eager":
            return "the bias written out, as eager attention holds all logits anyway"
        if backend == "flash_attention_2":
            native = "flash-attention's own ALiBi; where positions do not count up by one, " if self.narrow else ""
            return native + extra
        if backend == "flex_attention" or (backend == "auto" and device.type == "cuda"):
            return "flex_attention, which looks the bias up by the distance"
        if not self.scheme.relative:
            return "SDPA by blocks of queries with the bias written out, as it goes by more than the distance"
        if device.type not in ("cpu", "meta"):
            return f"SDPA with {extra}, as the bias separates" if self.separable else "SDPA by blocks of queries"
        masked = extra if self.narrow else "blocks written out"
        return f"SDPA by blocks of queries, the bias a view of one row, as it goes by distance; masked: {masked}"

    def gather(self, decoder: Any) -> dict[str, torch.Tensor] | None:
        return getattr(decoder, LEARNED)(None) if self.scheme.learned else None

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
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of query (B, H, Q, D) to key, value (B, Hkv, K, D) with the bias: output (B, Q, H, D) and the weights, if any."""
        self._refuse(module, options)
        memo = {} if call.memo is None else call.memo.known
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        weights = self._weights(module, query, call)
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if backend != "flash_attention_2":  # whose mask is 2-D and hides padding only
            mask = check_mask(self.scheme, mask, causal, query.shape[2], call.total, memo)
        sight = Sight(mask, causal, *positions)
        tensors = module, query, key, value
        heads = heads_seen(call.part, query.shape[1], self.heads)
        scheme: Any = self.scheme if heads == slice(None) else ShareOfHeads(self.scheme, heads)
        ring = call.part is not None and not call.part.by_heads
        if options.get("output_attentions"):
            return self._written_out(
                scheme, call.part, *tensors, sight, weights, scaling, stock_function("eager", module), options
            )
        # A soft cap comes before the bias, an attention sink beside all logits: both need the bias itself in the logits
        needs_logits = options.get("softcap") is not None or hasattr(module, "sinks")
        if query.shape[2] == 1 or backend == "eager" or (needs_logits and backend != "flex_attention"):
            return self._written_out(scheme, call.part, *tensors, sight, weights, scaling, inner, options)
        if backend == "flash_attention_2":
            return self._flash(scheme, call.part, *tensors, sight, weights, scaling, options)
        if backend == "flex_attention" or (backend == "auto" and self._prefers_flex(query, options)):
            refuse_ring(call.part, f"{self.scheme.name} in flex_attention")
            if mask is not None and mask.dtype != torch.bool:
                raise PatchError(
                    f"{type(module).__name__} adds numbers in its mask, which flex_attention is not given; choose backend='sdpa'"
                )
            return self._flex(scheme, query, key, value, sight, weights, scaling, memo, options), None
        distances = None
        if mask is None and query.device.type == "cpu" and not ring:
            distances = Distances.of(scheme, weights, sight)
        by_features = self.narrow if query.device.type == "cpu" and not ring else self.separable
        if distances is None and by_features and fits(scheme, query.shape[-1], query.dtype, weights):
            centre = None if call.part is None else call.part.centre.to(query.device)
            return separable_attention(
                scheme, weights, positions, inner, *tensors, mask, scaling=scaling, centre=centre, **options
            )
        refuse_ring(call.part, self.scheme.name)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
        drop = options.get("dropout", 0.0)
        output = block_attention(scheme, weights, sight, distances, query, key, value, scaling=scaling, drop=drop)
        return output, None

    def _weights(self, module: Any, query: torch.Tensor, call: Call) -> dict[str, torch.Tensor]:
        if call.weights is not None:
            return weights_of_layer(call.weights, module.layer_idx, query.device)
        if query.dtype == torch.float64:
            return {name: value.to(query.device) for name, value in self.exact.items()}
        return {name: value.on(query.device) for name, value in self.constants.items()}

    def _refuse(self, module: Any, options: dict[str, Any]) -> None:
        if options.get("position_bias") is not None:
            raise PatchError(
                f"{type(module).__name__} was given a position_bias, and {self.scheme.name!r} is a bias already; leave position_bias out, or "
                "take the scheme out with hfpos.unpatch"
            )
        if options.get("cache") is not None:
            raise PatchError(
                f"{type(module).__name__} was called with a paged cache (continuous batching), which does not tell {self.scheme.name!r} where "
                "its keys stand; generate without it"
            )

    def _written_out(
        self,
        scheme: Any,
        part: Part | None,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sight: Sight,
        weights: dict[str, torch.Tensor],
        scaling: float,
        inner: Callable,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The bias as the additive mask of a stock function, float32 or wider where that takes it: of one query, a row."""
        refuse_ring(part, f"{self.scheme.name} as a bias tensor")
        scaled = query * scaling if scheme.reads_query else None
        bias = bias_of(scheme, sight.q_positions, sight.k_positions, weights, scaled)
        mask = full_mask(sight.mask, query, key, module, sight.causal)
        only_narrow = is_fused(inner) and query.device.type != "cpu"
        wide = query.dtype if only_narrow else torch.promote_types(query.dtype, torch.float32)
        mask = add_bias(bias, mask, wide).expand(query.shape[0], -1, -1, -1)
        return inner(module, query, key, value, mask, scaling=scaling, **options)

    def _prefers_flex(self, query: torch.Tensor, options: dict[str, Any]) -> bool:
        possible = query.is_cuda and not options.get("dropout") and not torch.compiler.is_compiling()
        return self.scheme.relative and not self.narrow and possible

    def _flex(
        self,
        scheme: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sight: Sight,
        weights: dict[str, torch.Tensor],
        scaling: float,
        memo: dict[Any, Any],
        options: dict[str, Any],
    ) -> torch.Tensor:
        tensors = (query, key, value, *weights.values())
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        refuse_flex(self.scheme, differentiable, query.device.type, options)
        softcap = options.get("softcap")
        return biased_flex_attention(
            scheme, weights, sight, query, key, value, scaling=scaling, softcap=softcap, memo=memo
        )

    def _flash(
        self,
        scheme: Any,
        part: Part | None,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sight: Sight,
        weights: dict[str, torch.Tensor],
        scaling: float,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if (
            sight.mask is None
            and options.get("position_ids") is None
            and bool((sight.q_positions.diff(dim=-1) <= 0).any())
        ):
            raise PatchError(
                f"{type(module).__name__} packs documents, and does not tell flash_attention_2 where they begin; choose backend='sdpa'"
            )
        if part is not None:
            raise PatchError(
                f"{self.scheme.name!r} on flash_attention_2 is not known to be right where several processes share a sequence; choose "
                "backend='sdpa'"
            )
        if isinstance(scheme, Alibi):
            window, drop = options.get("sliding_window"), options.get("dropout", 0.0)
            output = flash_alibi(
                weights["slopes"], sight, query, key, value, scaling=scaling, dropout=drop, window=window
            )
            if output is not None:
                return output, None
        if not fits(scheme, query.shape[-1], query.dtype, weights):
            raise PatchError(
                f"{self.scheme.name!r} needs more than {WIDEST} dimensions a head on flash_attention_2 (here {query.shape[-1]} and its own); "
                "choose backend='sdpa'"
            )
        positions = sight.q_positions, sight.k_positions
        return separable_attention(
            scheme,
            weights,
            positions,
            flash_attention,
            module,
            query,
            key,
            value,
            sight.mask,
            scaling=scaling,
            **options,
        )
