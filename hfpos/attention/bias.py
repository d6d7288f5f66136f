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
from hfpos.attention.distances import Distances
from hfpos.attention.flash import flash_alibi, flash_attention
from hfpos.attention.flex import biased_flex_attention, refuse_flex
from hfpos.attention.interface import is_fused, stock_function
from hfpos.attention.layer import Layer
from hfpos.attention.learned import LEARNED, weights_of_layer
from hfpos.attention.masks import check_mask, refuse_numbers
from hfpos.attention.seam import Seam
from hfpos.attention.separable import WIDEST, fits
from hfpos.attention.sequence_parallel import ShareOfHeads, heads_seen, refuse_ring
from hfpos.constant import Constant
from hfpos.scheme import PatchError
from hfpos.schemes.alibi import Alibi


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.call import Call
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
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        flash = backend == "flash_attention_2"  # whose mask is 2-D and hides padding only
        checked = check_mask(self.scheme, None if flash else mask, causal, query.shape[2], call.total, memo)
        mask = mask if flash else checked
        if torch.is_autocast_enabled(query.device.type):  # kernels would round positions in wider queries
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (x.to(dtype) for x in (query, key, value))
        heads = heads_seen(call.part, query.shape[1], self.heads)
        layer = Layer(
            module=module,
            query=query,
            key=key,
            value=value,
            scheme=self.scheme if heads == slice(None) else ShareOfHeads(self.scheme, heads),
            weights=self._weights(module, query, call),
            sight=Sight(mask, causal, *positions),
            part=call.part,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            options=options,
        )
        if (options.get("output_attentions") and not flash) or backend == "eager":
            return self._written_out(layer, stock_function("eager", module), memo)
        # A soft cap comes before the bias, an attention sink beside all logits: both need the bias itself in the logits
        needs_logits = options.get("softcap") is not None or hasattr(module, "sinks")
        if flash:
            return self._flash(layer, needs_logits)
        if query.shape[2] == 1:
            return self._written_out(
                layer, stock_function("eager" if options.get("softcap") else "sdpa", module), memo
            )
        if backend == "flex_attention" or (backend == "auto" and self._prefers_flex(layer)):
            return self._flex(layer, memo), None
        if needs_logits:
            return self._written_out(layer, inner, memo)
        return self._sdpa(layer, inner)

    def _weights(self, module: Any, query: torch.Tensor, call: Call) -> dict[str, torch.Tensor]:
        if self.scheme.learned and call.weights is not None:
            return weights_of_layer(call.weights, getattr(module, "layer_idx", 0), query.device)
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
        self, layer: Layer, inner: Callable, memo: dict[Any, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The bias as the additive mask of a stock function, float32 or wider where that takes it: of one query, a row."""
        refuse_ring(layer.part, f"{self.scheme.name} as a bias tensor")
        sight, query = layer.sight, layer.query
        only_narrow = is_fused(inner) and query.device.type != "cpu"
        dtype = query.dtype if only_narrow else torch.promote_types(query.dtype, torch.float32)
        if query.shape[2] > 1 or not self._same_in_all_layers(layer):
            return layer.by(inner, layer.additive_mask(dtype))
        sources = sight.mask, sight.q_positions, sight.k_positions
        known = ("row", id(self), dtype, *map(id, sources))
        if known not in memo:
            memo[known] = layer.additive_mask(dtype), sources  # while these are kept, their ids are their own
        return layer.by(inner, memo[known][0])

    def _same_in_all_layers(self, layer: Layer) -> bool:
        """Whether one layer can make the bias for the others too: not where each has its own, nor where it is learned just now."""
        own = self.scheme.reads_query or (self.scheme.learned and not self.scheme.shared)
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in layer.weights.values())
        return not (own or learning or torch.compiler.is_compiling())

    def _sdpa(self, layer: Layer, inner: Callable) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Several queries on SDPA."""
        query, key, value, sight = layer.query, layer.key, layer.value, layer.sight
        ring = layer.part is not None and not layer.part.by_heads
        on_cpu = query.device.type == "cpu" and not ring
        distances = None
        if on_cpu and sight.mask is None:
            distances = Distances.of(layer.scheme, layer.weights, sight)
        by_features = self.narrow if on_cpu else self.separable
        if distances is None and by_features and fits(layer.scheme, query.shape[-1], query.dtype, layer.weights):
            return layer.separated(inner)
        refuse_ring(layer.part, self.scheme.name)
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
        drop = layer.options.get("dropout", 0.0)
        output = block_attention(
            layer.scheme, layer.weights, sight, distances, query, key, value, scaling=layer.scaling, drop=drop
        )
        return output, None

    def _prefers_flex(self, layer: Layer) -> bool:
        possible = layer.query.is_cuda and not layer.options.get("dropout") and not torch.compiler.is_compiling()
        return self.scheme.relative and not self.narrow and possible

    def _flex(self, layer: Layer, memo: dict[Any, Any]) -> torch.Tensor:
        refuse_ring(layer.part, f"{self.scheme.name} in flex_attention")
        tensors = (layer.query, layer.key, layer.value, *layer.weights.values())
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        refuse_flex(self.scheme, differentiable, layer.query.device.type, layer.sight.mask, layer.options)
        return biased_flex_attention(
            layer.scheme,
            layer.weights,
            layer.sight,
            *tensors[:3],
            scaling=layer.scaling,
            softcap=layer.options.get("softcap"),
            memo=memo,
        )

    def _flash(self, layer: Layer, needs_logits: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        sight, options, width = layer.sight, layer.options, layer.query.shape[-1]
        restarts = sight.mask is None and bool((sight.q_positions.diff(dim=-1) <= 0).any())
        problem = (
            "is not known to be right where several processes share a sequence"
            if layer.part is not None
            else "cannot stand beside a soft cap or an attention sink, which this model has"
            if needs_logits
            else "gives no attention weights; for output_attentions call model.set_attn_implementation('eager')"
            if options.get("output_attentions")
            else f"packs documents without knowing where they begin, as {type(layer.module).__name__} does not tell"
            if restarts and options.get("position_ids") is None
            else None
        )
        if problem is None and isinstance(layer.scheme, Alibi):
            output = flash_alibi(
                layer.weights["slopes"],
                sight,
                *(layer.query, layer.key, layer.value),
                scaling=layer.scaling,
                dropout=options.get("dropout", 0.0),
                window=options.get("sliding_window"),
            )
            if output is not None:
                return output, None
        if problem is None and not fits(layer.scheme, width, layer.query.dtype, layer.weights):
            problem = f"needs more than {WIDEST} dimensions a head (here {width} and its own)"
        if problem is not None:
            raise PatchError(f"{self.scheme.name!r} on flash_attention_2 {problem}; choose backend='sdpa'")
        return layer.separated(flash_attention)
