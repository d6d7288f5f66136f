"""ALiBi without a dense bias: against float64, in every dtype, with gradients, weights and dropout, and against stock BLOOM."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import hfpos
from hfpos.attention.bias import BiasedAttention
from hfpos.call import Call
from hfpos.scheme import Geometry
from hfpos.schemes import Alibi
from tests.pairs import ROTARY, difference, tokens, unpatched, use_backend
from tests.reference import llama_logits


# Largest error of the output against float64, where values are up to 4; what plain attention in this dtype is off by, too.
BOUNDS = {torch.float32: 2e-4, torch.bfloat16: 0.03, torch.float16: 0.003}
QUERIES, KEYS = 48, 3000


def layer(heads: int, key_heads: int) -> torch.nn.Module:
    """What attention functions read of an attention module."""
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal, module.config = heads // key_heads, True, SimpleNamespace()
    return module.eval()


def geometry(heads: int) -> Geometry:
    """Of a model with heads of 64."""
    return Geometry(heads=heads, head_dim=64, rotary_dim=64, theta=1e4, trained_length=512, allowed_length=512)


def example(heads: int, key_heads: int, dtype: torch.dtype, spacing: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and the positions of queries and keys; the queries stand at the end, `spacing` apart."""
    generator = torch.Generator().manual_seed(heads)
    shapes = ((heads, QUERIES), (key_heads, KEYS), (key_heads, KEYS))
    q, k, v = (torch.randn(1, *shape, 64, generator=generator).to(dtype) for shape in shapes)
    k_positions = torch.arange(KEYS)[None] * spacing
    return q, k, v, k_positions[:, -QUERIES:], k_positions


def dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    scheme: Alibi,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, Q, H, D) and weights (B, H, Q, K) of causal attention with the bias written out, float64."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    distance = (q_positions[:, None, :, None] - k_positions[:, None, None, :]).double()
    slopes = torch.tensor(scheme.head_slopes(q.shape[1]), dtype=torch.float64)[:, None, None]
    logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 - slopes * distance
    weights = logits.masked_fill(distance < 0, float("-inf")).softmax(-1)
    return (weights @ v).transpose(1, 2), weights


def attend(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same by `BiasedAttention`, under the mask that `backend` is given for it."""
    bias, module = BiasedAttention(Alibi(), geometry(q.shape[1])), layer(q.shape[1], k.shape[1])
    visible = k_positions[:, None, None, :] <= q_positions[:, None, :, None]
    low = torch.finfo(q.dtype).min
    mask = visible if backend == "sdpa" else torch.where(visible, torch.tensor(0, dtype=q.dtype), low)
    call = Call(bias, q_positions, k_positions, k.shape[2])
    return bias.attend(module, q, k, v, mask, call=call, backend=backend, **options)


@pytest.mark.parametrize("spacing", [1, 20])  # the second one reaches over 60,000 positions
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("heads", "key_heads"), [(12, 12), (20, 5), (40, 8)])
def test_long_range_equals_the_dense_float64_bias(
    heads: int, key_heads: int, dtype: torch.dtype, backend: str, spacing: int
) -> None:
    arguments = example(heads, key_heads, dtype, spacing)
    expected, _ = dense(*arguments, Alibi())
    output, _ = attend(backend, *arguments)
    assert output.dtype == dtype
    assert difference(output.double(), expected) < BOUNDS[dtype]
    last = [x[:, :, -1:] for x in arguments[:1]] + [*arguments[1:3], arguments[3][:, -1:], arguments[4]]
    assert difference(attend(backend, *last)[0].double(), expected[:, -1:]) < BOUNDS[dtype]  # as in decoding


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_unfused_kernel_keeps_the_bias_exact(dtype: torch.dtype) -> None:
    arguments = example(12, 12, dtype, 20)
    with sdpa_kernel(SDPBackend.MATH):  # what attention with dropout runs on
        output, _ = attend("sdpa", *arguments)
    assert difference(output.double(), dense(*arguments, Alibi())[0]) < BOUNDS[dtype]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_gradients_are_those_of_the_dense_bias(backend: str) -> None:
    q, k, v, q_positions, k_positions = example(12, 4, torch.float32, 20)
    inputs = [x[..., -200:, :].clone().requires_grad_() for x in (q, k, v)]
    k_positions = k_positions[:, -200:]
    direction = torch.randn(1, QUERIES, 12, 64, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad((dense(*inputs, q_positions, k_positions, Alibi())[0] * direction).sum(), inputs)
    gradients = torch.autograd.grad((attend(backend, *inputs, q_positions, k_positions)[0] * direction).sum(), inputs)
    for a, b in zip(gradients, expected, strict=True):
        assert difference(a, b) < 1e-4


def test_eager_weights_carry_the_bias() -> None:
    arguments = example(12, 4, torch.float32, 1)
    _, weights = attend("eager", *arguments)
    assert difference(weights.double(), dense(*arguments, Alibi())[1]) < 1e-5


@pytest.mark.parametrize("model_type", [*ROTARY, "gpt2", "bloom"])
@torch.no_grad()
def test_output_attentions_carry_the_bias(model_type: str) -> None:
    model = hfpos.patch(unpatched(model_type), "alibi", slopes=[2.0, 1.0, 0.5, 0.25])
    use_backend(model, "eager")
    ids = tokens(1, 30)
    biased = model(ids, output_attentions=True).attentions[-1]
    hfpos.patch(model, "nope")
    use_backend(model, "eager")
    plain = model(ids, output_attentions=True).attentions[-1]
    assert biased.shape == plain.shape == (1, 4, 30, 30)
    near = [weights.tril().triu(-2).sum(-1)[..., 5:].mean((0, 2)) for weights in (biased, plain)]
    assert (near[0] > near[1]).all()
    assert near[0][0] > 0.6  # the steepest head looks at its neighbours


@torch.no_grad()
def test_a_patched_llama_equals_the_dense_reference() -> None:
    model = hfpos.patch(unpatched("llama"), "alibi")
    ids, positions = tokens(1, 60), torch.arange(60).double()
    slopes = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8], dtype=torch.float64)[:, None, None]
    bias = -slopes * (positions[:, None] - positions)
    expected = llama_logits(model, ids, lambda q, k: q @ k.transpose(-1, -2) / 4 + bias)
    assert difference(model(ids).logits.double(), expected) < 2e-5


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_bidirectional_distances_have_no_sign(backend: str) -> None:
    q, k, v, _, k_positions = example(4, 4, torch.float32, 1)
    k, v, q_positions = k[:, :, :QUERIES], v[:, :, :QUERIES], k_positions[:, :QUERIES]
    scheme = Alibi(bidirectional=True)
    bias, module = BiasedAttention(scheme, geometry(4)), layer(4, 4)
    everything = torch.ones(1, 1, QUERIES, QUERIES, dtype=torch.bool)
    mask = everything if backend == "sdpa" else torch.zeros(1, 1, QUERIES, QUERIES)
    call = Call(bias, q_positions, q_positions, QUERIES)
    output, _ = bias.attend(module, q, k, v, mask, call=call, backend=backend)
    distance = (q_positions[0][:, None] - q_positions[0]).abs().double()
    slopes = torch.tensor(scheme.head_slopes(4), dtype=torch.float64)[:, None, None]
    logits = q.double() @ k.double().transpose(-1, -2) / 8 - slopes * distance
    assert difference(output.double(), (logits.softmax(-1) @ v.double()).transpose(1, 2)) < 1e-5


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_attention_dropout_runs(model_type: str, backend: str) -> None:
    dropout = {"llama": "attention_dropout", "gpt2": "attn_pdrop", "bloom": "attention_dropout"}[model_type]
    model = hfpos.patch(unpatched(model_type, **{dropout: 0.5}), "alibi", factor=2)
    use_backend(model, backend)
    ids = tokens(1, 40)
    calm = model(ids).logits
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model.train()(ids, labels=ids).loss)
    assert losses[0] == losses[1] != losses[2]
    losses[2].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert torch.equal(model.eval()(ids).logits, calm)


@torch.no_grad()
def test_bloom_keeps_its_logits_and_loses_its_rounding() -> None:
    stock = unpatched("bloom")
    patched = hfpos.patch(unpatched("bloom"), "alibi")
    ids, mask = tokens(2, 300), torch.ones(2, 300, dtype=torch.long)
    exact = stock(ids).logits
    assert difference(patched(ids).logits, exact) < 1e-5
    mask[0, :50] = 0
    visible = mask.bool()
    assert (
        difference(patched(ids, attention_mask=mask).logits[visible], stock(ids, attention_mask=mask).logits[visible])
        < 1e-5
    )
    rounded = [(model.bfloat16()(ids).logits.float() - exact).abs().mean() for model in (patched, stock)]
    assert rounded[0] < 0.5 * rounded[1]
    assert rounded[0] < 0.02 * exact.abs().mean()


@pytest.mark.parametrize(
    ("scheme", "made"), [("alibi", 1), ("kerple", 1), ("fire", 2)]
)  # the last has weights for each layer
@torch.no_grad()
def test_one_row_of_the_bias_serves_all_layers_of_a_step(
    scheme: str, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hfpos.patch(unpatched("llama"), scheme)
    cache = model(tokens(1, 20), use_cache=True).past_key_values
    rows, kind = [], hfpos.schemes()[scheme]
    own = kind.formula
    monkeypatch.setattr(kind, "formula", lambda *args: rows.append(own(*args)) or rows[-1])
    model(tokens(1, 1), past_key_values=cache, use_cache=True)
    assert [row.shape for row in rows] == [(1, 4, 1, 21)] * made


@torch.no_grad()
def test_layers_that_cache_other_keys_have_rows_of_their_own() -> None:
    model = hfpos.patch(unpatched("gemma3_text"), "alibi")  # one layer of which has a window
    ids = tokens(1, 40)
    expected = model(ids).logits
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    assert difference(model(ids[:, -1:], past_key_values=cache, use_cache=True).logits, expected[:, -1:]) < 2e-5
