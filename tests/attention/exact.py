"""Biased attention in float64 from the papers' formulas, using nothing of hfpos, and small calls to compare with it.

Shapes: B batch, H heads, Hkv key heads, Q queries, K keys, D head_dim.
"""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import softplus
from transformers.models.t5.modeling_t5 import T5Attention

import hfpos
from hfpos.attention.bias import BiasedAttention
from hfpos.call import Call
from hfpos.scheme import Geometry


HEADS, KEY_HEADS, WIDTH = 4, 2, 16
SCHEMES = {
    "alibi": ("alibi", {}),
    "alibi both ways": ("alibi", {"bidirectional": True}),
    "sandwich": ("sandwich", {"dim": 6}),
    "kerple": ("kerple", {}),
    "kerple power": ("kerple", {"kind": "power"}),
    "t5": ("t5", {"num_buckets": 12, "max_distance": 200}),
    "t5 both ways": ("t5", {"num_buckets": 12, "max_distance": 200, "bidirectional": True}),
    "fire": ("fire", {"hidden": 3, "threshold": 50.0}),
    "shaw": ("shaw", {"max_distance": 5}),
}
BOTH_WAYS = ("alibi both ways", "sandwich", "kerple", "kerple power", "t5 both ways", "shaw")
RELATIVE = tuple(name for name in SCHEMES if name not in ("fire", "shaw"))


def random_weights(name: str, heads: int = HEADS, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Random learned weights of a scheme, float32; none of a fixed one."""
    scheme, generator = build(name), torch.Generator().manual_seed(len(name))
    start = scheme.weights(geometry(heads, width)) if scheme.learned else {}
    return {key: value.float() + 0.5 * torch.randn(value.shape, generator=generator) for key, value in start.items()}


def build(name: str) -> Any:
    """The scheme of one of the names of `SCHEMES`."""
    scheme, parameters = SCHEMES[name]
    return hfpos.schemes()[scheme].create(**parameters)


def geometry(heads: int = HEADS, width: int = WIDTH) -> Geometry:
    """Of a model with such heads."""
    return Geometry(heads=heads, head_dim=width, rotary_dim=width, theta=1e4, trained_length=512, allowed_length=512)


def formula(
    name: str,
    weights: dict[str, torch.Tensor],
    i: torch.Tensor,
    j: torch.Tensor,
    query: torch.Tensor,
) -> torch.Tensor:
    """The bias (B, H, Q, K), float64, of queries at `i` (B, 1, Q, 1) and keys at `j` (B, 1, 1, K); `query` (B, H, Q, D) is scaled."""
    scheme, options = SCHEMES[name]
    heads = torch.arange(1, query.shape[1] + 1, dtype=torch.float64)[:, None, None]
    distance = (i - j).double()
    if scheme == "alibi":
        return -(2.0 ** (-8 * heads / query.shape[1])) * (distance.abs() if options else distance)
    if scheme == "sandwich":
        dim = options["dim"]
        waves = sum((distance * 10_000 ** (-2 * k / dim)).cos() for k in range(dim // 2))
        return (waves - dim / 2) * query.shape[1] / (8 * heads)
    w = {key: value.double() for key, value in weights.items()}
    if scheme == "kerple":
        r1 = softplus(w["raw_r1"])[:, None, None]
        if "kind" in options:
            return -r1 * distance.abs() ** (2 * w["raw_r2"].sigmoid())[:, None, None]
        return -r1 * (1 + softplus(w["raw_r2"])[:, None, None] * distance.abs()).log()
    if scheme == "t5":
        both = options.get("bidirectional", False)
        buckets = T5Attention._relative_position_bucket(j - i, both, options["num_buckets"], options["max_distance"])
        return w["table"][buckets[:, 0]].permute(0, 3, 1, 2)
    if scheme == "fire":
        c, threshold = w["c"].abs(), (w["multiplier"] * options["threshold"]).abs()
        x = (1 + c * distance.clamp(min=0)).log() / ((1 + c * torch.maximum(i.double(), threshold)).log() + 1e-6)
        hidden = (x[:, 0, :, :, None] * w["hidden_weight"][:, 0] + w["hidden_bias"]).relu()
        return (hidden @ w["output_weight"].T + w["output_bias"]).permute(0, 3, 1, 2)
    m = options["max_distance"]
    vectors = w["table"][((j - i).clamp(-m, m) + m)[:, 0]]  # (B, Q, K, D)
    return torch.einsum("bhqd,bqkd->bhqk", query, vectors.expand(query.shape[0], -1, -1, -1))


@dataclass
class Example:
    """Queries, keys and values, where they stand and what sees what.

    Attributes:
        tensors: query (B, H, Q, D), key and value (B, Hkv, K, D).
        q_positions, k_positions: (B or 1, Q) and (B or 1, K).
        visible: (B or 1, 1, Q, K).
        mask: what attention is given to say so; None for what `causal` says.
        causal: of the module.
    """

    tensors: list[torch.Tensor]
    q_positions: torch.Tensor
    k_positions: torch.Tensor
    visible: torch.Tensor
    mask: torch.Tensor | None = None
    causal: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def real(self) -> torch.Tensor:
        """Which queries see anything, as a factor (B or 1, Q, 1, 1) of the output."""
        return self.visible.any(-1)[:, 0, :, None, None]

    def to(self, dtype: torch.dtype) -> "Example":
        """The same in another dtype."""
        return Example([x.to(dtype) for x in self.tensors], *list(vars(self).values())[1:])

    def with_mask(self, dtype: torch.dtype | None = None) -> "Example":
        """The same with its mask written out, boolean or additive in `dtype`."""
        mask = self.visible
        if dtype is not None:
            mask = torch.where(mask, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
        return Example(*list(vars(self).values())[:4], mask, self.causal, self.options)


def example(
    queries: int, keys: int | None = None, batch: int = 2, heads: tuple[int, int] = (HEADS, KEY_HEADS)
) -> Example:
    """Random tensors, the queries at the end of the keys. A mask is given where they are fewer than these."""
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(queries)
    sizes = (heads[0], queries), (heads[1], keys), (heads[1], keys)
    tensors = [torch.randn(batch, *size, WIDTH, generator=generator) for size in sizes]
    k_positions = torch.arange(keys)[None]
    q_positions = k_positions[:, keys - queries :]
    visible = (k_positions[:, None, None, :] <= q_positions[:, None, :, None]).clone()
    return Example(tensors, q_positions, k_positions, visible, None if keys == queries else visible)


def module(causal: bool = True, training: bool = False) -> torch.nn.Module:
    """What attention functions read of an attention module."""
    found = torch.nn.Module()
    found.num_key_value_groups, found.layer_idx, found.is_causal = HEADS // KEY_HEADS, 0, causal
    found.config = SimpleNamespace(_attn_implementation="hfpos_sdpa")
    return found.train(training)


def reference(name: str, given: Example, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output (B, Q, H, D), float64; zero where a query sees nothing."""
    q, k, v = (x.double() for x in given.tensors)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    q = q / math.sqrt(q.shape[-1])
    bias = formula(name, weights, given.q_positions[:, None, :, None], given.k_positions[:, None, None, :], q)
    logits = (q @ k.mT + bias).masked_fill(~given.visible, float("-inf"))
    seen = given.visible.any(-1, keepdim=True)
    return (logits.masked_fill(~seen, 0.0).softmax(-1) @ v).transpose(1, 2) * given.real()


def attend(
    name: str, given: Example, weights: dict[str, torch.Tensor], backend: str = "sdpa", **options: Any
) -> torch.Tensor:
    """The same by `BiasedAttention`: (B, Q, H, D)."""
    bias = BiasedAttention(build(name), geometry(given.tensors[0].shape[1]))
    learned = {key: value[None] for key, value in weights.items()} or None
    call = Call(bias, given.q_positions, given.k_positions, given.tensors[1].shape[2], weights=learned)
    inside = module(given.causal, training=bool(options.get("dropout")))
    inside.num_key_value_groups = given.tensors[0].shape[1] // given.tensors[1].shape[1]
    output, _ = bias.attend(inside, *given.tensors, given.mask, call=call, backend=backend, **given.options | options)
    return output


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a fraction of the largest number of `b` where that is above 1."""
    return (a.double() - b).abs().max().item() / max(b.abs().max().item(), 1.0)


def compare(name: str, given: Example, backend: str = "sdpa", tolerance: float = 1e-5) -> None:
    """Assert that outputs and all gradients are those of the reference, and finite also of queries that see nothing."""
    weights = {key: value.to(given.tensors[0].dtype) for key, value in random_weights(name).items()}
    direction = torch.randn(1, *given.tensors[0].transpose(1, 2).shape[1:], generator=torch.Generator().manual_seed(9))
    results = []
    for calculate in (attend, reference):
        leaves = [x.clone().requires_grad_() for x in (*given.tensors, *weights.values())]
        here = Example(leaves[:3], *list(vars(given).values())[1:])
        arguments = name, here, dict(zip(weights, leaves[3:], strict=True))
        output = calculate(*arguments, backend) if calculate is attend else calculate(*arguments)
        shown = output * given.real()
        (shown * direction).sum().backward()
        assert output.isfinite().all()
        results.append([shown, *(x.grad for x in leaves)])
    for number, (found, expected) in enumerate(zip(*results, strict=True)):
        assert found.isfinite().all()
        bound = (
            tolerance if number < 4 else 3 * tolerance
        )  # a learned weight's gradient is a sum over all queries and keys
        assert difference(found.detach(), expected.detach()) < bound


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that attention takes from here on: view, written, features, flex, row (the bias as a whole, of one query or eager)."""
    found: list[str] = []

    def spy(module: Any, function: str, name: Any) -> None:
        original = getattr(module, function)

        def spied(*args: Any, **kwargs: Any) -> Any:
            found.append(name(args) if callable(name) else name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, spied)

    spy(hfpos.attention.bias, "block_attention", lambda args: "written" if args[3] is None else "view")
    spy(hfpos.attention.layer, "separable_attention", "features")
    spy(hfpos.attention.bias, "biased_flex_attention", "flex")
    spy(hfpos.attention.layer, "add_bias", "row")
    return found
