"""One layer's attention with a bias, computed in every way that is measured against the others.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers.models.llama.modeling_llama import eager_attention_forward

from hfpos.attention.bias import BiasedAttention
from hfpos.attention.dense import add_bias, causal
from hfpos.attention.interface import stock_function
from hfpos.attention.separable import separable_attention
from hfpos.call import Call, Memo
from hfpos.scheme import Bias, Geometry


class Layer:
    """Random queries, keys and values of one layer, and what attention functions read of its module.

    They are bfloat16 numbers in every dtype, so that one float64 reference serves all.

    Args:
        tokens: K; the queries are the last of them.
        dtype: of queries, keys and values.
        heads, key_heads, head_dim: H, Hkv (H unless given) and D.
        queries: Q, all K unless given.
        device: where they lie.
    """

    def __init__(
        self,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        *,
        heads: int = 12,
        key_heads: int | None = None,
        head_dim: int = 64,
        queries: int | None = None,
        device: str = "cpu",
    ) -> None:
        queries, key_heads = queries or tokens, key_heads or heads
        generator = torch.Generator().manual_seed(tokens)
        shapes = (heads, queries), (key_heads, tokens), (key_heads, tokens), (queries, heads)
        query, key, value, gradient = (
            torch.randn(1, *shape, head_dim, generator=generator).bfloat16().to(device, dtype) for shape in shapes
        )
        self.query, self.key, self.value = (x.requires_grad_() for x in (query, key, value))
        self.gradient = gradient  # of the output (1, Q, H, D)
        self.k_positions = torch.arange(tokens, device=device)[None]
        self.q_positions = self.k_positions[:, tokens - queries :]
        self.geometry = Geometry(
            heads=heads, head_dim=head_dim, rotary_dim=head_dim, theta=1e4, trained_length=None, allowed_length=None
        )
        self.scaling = head_dim**-0.5
        self.module = _module(heads // key_heads)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (1, H, Q, D), keys and values (1, Hkv, K, D); as in a model, they want no gradient under `torch.no_grad()`."""
        if torch.is_grad_enabled():
            return self.query, self.key, self.value
        return self.query.detach(), self.key.detach(), self.value.detach()

    def weights(self, scheme: Bias) -> dict[str, torch.Tensor]:
        """The scheme's weights as a patched model holds them: float32, and parameters where they are learned."""
        found = scheme.weights(self.geometry)
        return {
            name: x.to(self.query.device, torch.float32).requires_grad_(scheme.learned) for name, x in found.items()
        }


def _module(groups: int) -> Any:
    module: Any = torch.nn.Module().eval()
    module.num_key_value_groups, module.is_causal, module.layer_idx = groups, True, 0
    module.config = SimpleNamespace()
    return module


class Contender(NamedTuple):
    """One way to compute the attention of a layer.

    Attributes:
        output: computes (1, Q, H, D).
        weights: what else than queries, keys and values it is differentiated by.
        layer: of which layer.
    """

    output: Callable[[], torch.Tensor]
    weights: dict[str, torch.Tensor]
    layer: Layer

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        """The output, without gradients."""
        return self.output()

    def forward_backward(self) -> tuple[torch.Tensor, ...]:
        """The gradients of queries, keys, values and weights."""
        inputs = [*self.layer.tensors, *self.weights.values()]
        return torch.autograd.grad(self.output(), inputs, self.layer.gradient)


def plain(layer: Layer) -> Contender:
    """Causal attention without a bias, by Transformers' SDPA function: what a bias costs nothing against."""
    inner = stock_function("sdpa", layer.module)
    return Contender(lambda: inner(layer.module, *layer.tensors, None, scaling=layer.scaling)[0], {}, layer)


def biased(layer: Layer, scheme: Bias, backend: str = "sdpa") -> Contender:
    """What a patched model does. What its first layer works out for the others (flex's block mask) is kept between calls."""
    seam, memo = BiasedAttention(scheme, layer.geometry), Memo()
    learned = layer.weights(scheme) if scheme.learned else {}
    tokens = layer.k_positions.shape[1]

    def output() -> torch.Tensor:
        rows = {name: weight[None] for name, weight in learned.items()} or None
        call = Call(seam, layer.q_positions, layer.k_positions, tokens, weights=rows, memo=memo)
        return seam.attend(layer.module, *layer.tensors, None, call=call, backend=backend, scaling=layer.scaling)[0]

    return Contender(output, learned, layer)


def alone(layer: Layer, scheme: Any) -> Contender:
    """A scheme of the score seam as it is called without a model, on queries and keys that are not rotated."""
    return Contender(lambda: scheme(*layer.tensors).transpose(1, 2), {}, layer)


def by_extra_dimensions(layer: Layer, scheme: Bias) -> Contender:
    """The bias inside queries and keys, on Transformers' SDPA function: what a patched model does on a GPU."""
    weights, positions = layer.weights(scheme), (layer.q_positions, layer.k_positions)
    inner = stock_function("sdpa", layer.module)

    def output() -> torch.Tensor:
        return separable_attention(
            scheme, weights, positions, inner, layer.module, *layer.tensors, None, scaling=layer.scaling
        )[0]

    return Contender(output, {}, layer)


def dense(layer: Layer, scheme: Bias, made_before: bool = False) -> Contender:
    """The bias (1, H, Q, K) as Transformers' `position_bias`; made in every call, or once before, as what is not learned can be."""
    weights, inner = layer.weights(scheme), stock_function("sdpa", layer.module)

    def bias() -> torch.Tensor:
        return scheme.bias(layer.q_positions, layer.k_positions, weights).to(layer.query.dtype)

    made = bias() if made_before else None

    def output() -> torch.Tensor:
        given = bias() if made is None else made
        return inner(layer.module, *layer.tensors, None, scaling=layer.scaling, position_bias=given)[0]

    return Contender(output, weights if scheme.learned else {}, layer)


def eager(layer: Layer, scheme: Bias) -> Contender:
    """Transformers' eager function of LLaMA, the bias in its additive mask, made before."""
    bias = scheme.bias(layer.q_positions, layer.k_positions, layer.weights(scheme))
    mask = add_bias(bias, causal(bias.shape[2], bias.shape[3], bias.device), layer.query.dtype).detach()

    def output() -> torch.Tensor:
        return eager_attention_forward(layer.module, *layer.tensors, mask, scaling=layer.scaling)[0]

    return Contender(output, {}, layer)
