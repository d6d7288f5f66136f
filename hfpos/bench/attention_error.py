"""How far attention with a bias is off the same in float64: outputs, gradients, and the attention weights themselves.

An error is the largest difference of any entry, divided by the largest entry of the reference.

Shapes: H heads, Q queries, K keys, D head_dim, S sampled queries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from hfpos.bench.contenders import Contender, Layer, biased, by_extra_dimensions
from hfpos.scheme import Bias
from hfpos.schemes.alibi import Alibi, alibi_slopes


FORMS: dict[str, Callable[[Layer, Alibi], Contender]] = {"cpu": biased, "extra_dimensions": by_extra_dimensions}


def reference(layer: Layer, scheme: Bias, learned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float64: the `output` (1, Q, H, D) and the gradients of `query`, `key`, `value` and of the `learned` weights.

    For schemes with one number of each weight for each head, as one head is computed at a time.
    """
    exact = {name: x.detach().double() for name, x in learned.items()} or scheme.weights(layer.geometry)
    heads: list[list[torch.Tensor]] = []
    for head in range(layer.query.shape[1]):
        tensors = [x.detach()[:, head : head + 1].double().requires_grad_() for x in layer.tensors]
        weights = {name: x.to(layer.query.device)[head : head + 1].requires_grad_() for name, x in exact.items()}
        bias = scheme.formula(layer.q_positions, layer.k_positions, weights)
        query, key, value = tensors
        output = (causal_weights(query @ key.mT * layer.scaling + bias, layer.q_positions[0]) @ value).transpose(1, 2)
        inputs = [*tensors, *(weights[name] for name in learned)]
        found = torch.autograd.grad(output, inputs, layer.gradient[:, :, head : head + 1].double())
        heads.append([output.detach(), *found])
    names = ["output", "query", "key", "value", *learned]
    axes = [2, 1, 1, 1, *(0 for _ in learned)]
    parts = zip(*heads, strict=True)
    return {name: torch.cat(part, axis) for name, part, axis in zip(names, parts, axes, strict=True)}


def causal_weights(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Softmax of the logits (..., S, K) of the queries at the indices `rows` (S,), each of which sees keys 0 .. its own."""
    later = torch.arange(logits.shape[-1], device=logits.device) > rows[:, None]
    return logits.masked_fill(later, float("-inf")).softmax(-1)


def errors(contender: Contender, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """The error of the output and the largest of any gradient of queries, keys, values and learned weights."""
    found = dict(zip(expected, (contender.forward(), *contender.forward_backward()), strict=True))
    each = {name: relative_error(found[name], expected[name]) for name in expected}
    return {"output": each.pop("output"), "gradients": max(each.values())}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, divided by the largest value expected."""
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def steepest_slope(tokens: int, form: str) -> float:
    """The error of the output in float32 for one head of 16 with the steepest of 12 heads' slopes; all queries are run, 64 are checked."""
    layer = Layer(tokens, heads=1, head_dim=16)
    slope = max(alibi_slopes(12))
    rows = sampled(tokens, 64)
    output = FORMS[form](layer, Alibi(slopes=[slope])).forward()[0, rows, 0]
    query, key, value = (x.detach()[0, 0].double() for x in layer.tensors)
    distance = rows[:, None] - torch.arange(tokens)
    weights = causal_weights(query[rows] @ key.T * layer.scaling - slope * distance, rows)
    return relative_error(output, weights @ value)


def sampled(tokens: int, count: int) -> torch.Tensor:
    """Up to `count` indices of queries, evenly from the first to the last."""
    return torch.linspace(0, tokens - 1, min(count, tokens)).round().long()


def total_variation(layer: Layer) -> dict[str, float]:
    """Half the sum of the absolute differences of attention weights to float64's, of the worst head's worst query: 0 to 1.

    Args:
        layer: gives H, D, K and the dtype. D queries are sampled.
    """
    scheme = Alibi()
    rows = sampled(layer.query.shape[2], layer.query.shape[3])
    logits = (layer.query.detach()[0, :, rows].double() @ layer.key.detach()[0].double().mT) * layer.scaling
    distance = rows[:, None] - layer.k_positions[0]
    expected = causal_weights(logits - scheme.weights(layer.geometry)["slopes"][:, None, None] * distance, rows)
    found = {name: kernel_weights(form(layer, scheme), rows) for name, form in FORMS.items()}
    found["stock"] = bloom_weights(layer, rows)
    return {name: (weights.double() - expected).abs().sum(-1).max().item() / 2 for name, weights in found.items()}


def kernel_weights(contender: Contender, rows: torch.Tensor) -> torch.Tensor:
    """The attention weights (H, S, K) that a kernel worked with, of the queries `rows` (S <= D).

    Read off the gradient of the values, which is `sum_i w_ij g_i`: query s of the sample gets a gradient of 1 in dimension s alone.
    """
    gradient = torch.zeros_like(contender.layer.gradient)
    index = torch.arange(len(rows))
    gradient[0, rows, :, index] = 1
    (found,) = torch.autograd.grad(contender.output(), contender.layer.value, gradient)
    return found[0, :, :, : len(rows)].mT


def bloom_weights(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    """The attention weights (H, S, K) as stock BLOOM computes them: `slope * key position`, rounded, is added to rounded logits."""
    query, key, _ = (x.detach()[0] for x in layer.tensors)
    heads, tokens, _ = key.shape
    alibi = build_alibi_tensor(torch.ones(1, tokens, dtype=torch.int64), heads, layer.query.dtype)
    logits = torch.baddbmm(alibi, query[:, rows], key.mT, beta=1.0, alpha=layer.scaling)
    return causal_weights(logits.float(), rows).to(layer.query.dtype)
