"""T5 and its kin: every scheme in both stacks, as formulas have it; caches, padding, what is given and what is left alone."""

import functools
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import linear
from torch.testing import assert_close
from transformers.models.t5.modeling_t5 import T5Attention

import hfpos
from hfpos.bench.shrink import tiny_model
from tests.families.formulas import attention_logits, learned_weights, of_layer, padded, sinusoids


SCHEMES = ("rope", "alibi", "kerple", "sandwich", "t5", "shaw", "sinusoidal", "nope")
SIZES = {"d_kv": 16, "d_ff": 96, "dropout_rate": 0.0, "is_decoder": False, "decoder_start_token_id": 0}


def t5(kind: str = "T5ForConditionalGeneration", **overrides: Any) -> Any:
    model = tiny_model(getattr(transformers, kind), **SIZES | overrides)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
            elif ".q." in name:
                weight.mul_(8)  # attention that is far from uniform
    return model


def ids(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def stack_output(
    stack: Any, tokens: torch.Tensor, scheme: str | None, other: torch.Tensor | None = None
) -> torch.Tensor:
    """The last hidden states of one stack in float64; `other` those of the encoder, which the decoder attends to."""
    causal = other is not None
    w = dict(stack.named_parameters())
    x = stack.embed_tokens.weight[tokens]
    length, heads = tokens.shape[1], stack.config.num_heads
    if scheme == "sinusoidal":
        x = x + sinusoids(length, x.shape[-1])
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = seen.tril() if causal else seen

    def attend(at: str, states: torch.Tensor, keys: torch.Tensor, own: str | None, visible: Any) -> torch.Tensor:
        q, k, v = (
            linear(source, w[f"{at}.{name}.weight"]).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name, source in (("q", states), ("k", keys), ("v", keys))
        )
        weights = {"table": w["block.0.layer.0.SelfAttention.relative_attention_bias.weight"]}
        logits = attention_logits(own, q, k, 1.0, not causal, of_layer(stack, i) or weights)
        if visible is not None:
            logits = logits.masked_fill(~visible, float("-inf"))
        return linear((logits.softmax(-1) @ v).transpose(1, 2).flatten(2), w[f"{at}.o.weight"])

    for i in range(len(stack.block)):
        at = f"block.{i}.layer"
        h = norm(x, w[f"{at}.0.layer_norm.weight"])
        x = x + attend(f"{at}.0.SelfAttention", h, h, scheme, seen)
        if other is not None:
            h = norm(x, w[f"{at}.1.layer_norm.weight"])
            x = x + attend(f"{at}.1.EncDecAttention", h, other, None, None)
        last = f"{at}.{2 if causal else 1}"
        h = norm(x, w[f"{last}.layer_norm.weight"])
        inner = linear(h, w[f"{last}.DenseReluDense.wi.weight"]).relu()
        x = x + linear(inner, w[f"{last}.DenseReluDense.wo.weight"])
    return norm(x, w["final_layer_norm.weight"])


def reference(model: Any, source: torch.Tensor, target: torch.Tensor, encoder: Any, decoder: Any) -> torch.Tensor:
    """The logits (B, L, V) of a T5ForConditionalGeneration in float64, with a scheme in each stack; "t5" is its own."""
    states = stack_output(model.encoder, source, encoder)
    x = stack_output(model.decoder, target, decoder, states)
    return linear(x * model.config.d_model**-0.5, model.shared.weight)


def in_float64(model: Any) -> Any:
    """The model in float64, its norms too: those of T5 take their mean in float32, whatever they are given."""
    for module in model.double().modules():
        if type(module).__name__ == "T5LayerNorm":
            module.forward = functools.partial(norm, weight=module.weight)
    return model


def assert_is_reference(model: Any, encoder: str, decoder: str, close: float) -> None:
    in_float64(model)
    source, target = ids(83), ids(45, seed=1)
    found = model(input_ids=source, decoder_input_ids=target).logits
    expected = reference(model, source, target, encoder, decoder)
    assert_close(found, expected, rtol=0, atol=close)
    aim = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    one, other = (torch.autograd.grad((each * aim).sum(), trained) for each in (found, expected))
    for a, b in zip(one, other, strict=True):
        assert_close(a, b, rtol=close, atol=10 * close)


def test_the_reference_is_the_stock_model() -> None:
    assert_is_reference(t5(), "t5", "t5", 1e-9)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_and_gradients_are_the_formulas(scheme: str) -> None:
    """A learned bias also has a gradient for every weight; the trained tables, which take no part, have none."""
    model = hfpos.patch(t5(), scheme)
    learned_weights(model)
    assert_is_reference(model, scheme, scheme, 1e-4 if scheme == "sinusoidal" else 1e-9)


@pytest.mark.parametrize("scheme", [*SCHEMES, "learned"])
def test_padding_caches_and_backends_change_nothing(scheme: str) -> None:
    model = hfpos.patch(t5(), scheme, **({"target_length": 160} if scheme == "learned" else {}))
    learned_weights(model)
    source, target = ids(29), ids(17, seed=1)
    plain = model(input_ids=source, decoder_input_ids=target).logits
    for left, right in ((0, 6), (7, 0)):
        wide, mask = padded(source, left, right)
        assert_close(
            model(input_ids=wide, attention_mask=mask, decoder_input_ids=target).logits, plain, rtol=0, atol=2e-5
        )
    late, seen = padded(target, 5, 0)
    found = model(input_ids=source, decoder_input_ids=late, decoder_attention_mask=seen).logits
    assert_close(found[:, 5:], plain, rtol=0, atol=2e-5)
    states = model.get_encoder()(input_ids=wide, attention_mask=mask)
    step: Any = model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=target[:, :9], use_cache=True)
    parts = [step.logits]
    for i in range(9, 17):
        given = {"encoder_outputs": states, "attention_mask": mask, "past_key_values": step.past_key_values}
        step = model(decoder_input_ids=target[:, i : i + 1], use_cache=True, **given)
        parts.append(step.logits)
    assert_close(torch.cat(parts, 1), plain, rtol=0, atol=2e-5)
    model.set_attn_implementation("eager")
    assert_close(model(input_ids=source, decoder_input_ids=target).logits, plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scheme", ["alibi", "rope", "t5"])
def test_generation(scheme: str) -> None:
    """With a cache, static or growing, as without; greedy and with beams; on a padded batch."""
    model = hfpos.patch(t5(), scheme)
    source, mask = padded(ids(19, rows=2), 0, 4)
    mask[1, 12:] = 0
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    for beams in (1, 3):
        wanted = model.generate(source, num_beams=beams, use_cache=False, **given)
        assert torch.equal(model.generate(source, num_beams=beams, **given), wanted)
    wanted = model.generate(source, **given)
    assert torch.equal(model.generate(source, cache_implementation="static", **given), wanted)
    states = model.get_encoder()(input_ids=source, attention_mask=mask)
    assert torch.equal(model.generate(encoder_outputs=states, **given), wanted)
    assert len({tuple(row) for row in wanted.tolist()}) == 2


def test_its_own_scheme_starts_from_the_trained_tables() -> None:
    model = t5()
    source, target = ids(90), ids(40, seed=1)
    stock = model(input_ids=source, decoder_input_ids=target).logits
    hfpos.patch(model, "t5")
    assert_close(model(input_ids=source, decoder_input_ids=target).logits, stock, rtol=0, atol=2e-5)
    model(input_ids=source, decoder_input_ids=target).logits.sum().backward()
    for stack in (model.encoder, model.decoder):
        assert stack.hfpos_bias.table.grad.abs().sum() > 0
        assert not stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.requires_grad
    hfpos.patch(model, "t5", num_buckets=16)  # which the tables do not fit
    assert not model.encoder.hfpos_bias.table.any()
    stretched = hfpos.patch(model, "t5", max_distance=512)
    far = -torch.tensor([500])
    own = T5Attention._relative_position_bucket(far, True, 32, 512)
    assert torch.equal(
        model.encoder.hfpos_bias.table[0],
        stretched.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight,
    )
    assert int(hfpos.schemes()["t5"](bidirectional=True, max_distance=512).buckets(-far)) == int(own)


def test_attention_to_the_encoder_is_left_alone() -> None:
    model = t5()
    across = model.decoder.block[0].layer[1].EncDecAttention
    here, there = torch.randn(1, 5, 64), torch.randn(1, 11, 64)
    before = across(here, key_value_states=there)[0]
    inside: list[torch.Tensor] = []
    for scheme in ("alibi", "rope", "nope"):
        hfpos.patch(model, scheme)
        assert torch.equal(across(here, key_value_states=there)[0], before)
        handle = across.register_forward_hook(
            lambda module, args, kwargs, output: inside.append(
                (output[0] - alone(module, args[0], kwargs["key_value_states"])).abs().max()
            ),
            with_kwargs=True,
        )
        model(input_ids=ids(11), decoder_input_ids=ids(5))
        handle.remove()
    assert len(inside) == 3
    assert max(inside) < 1e-5


def alone(module: Any, here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Attention across without any positions, written out."""
    q, k, v = (
        layer(x).unflatten(-1, (module.n_heads, -1)).transpose(1, 2)
        for layer, x in ((module.q, here), (module.k, there), (module.v, there))
    )
    return module.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", ["MT5ForConditionalGeneration", "UMT5ForConditionalGeneration"])
def test_kin_of_t5(kind: str) -> None:
    model = t5(kind)
    source, mask = padded(ids(23), 0, 4)
    target = ids(9, seed=1)
    stock = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    for scheme in ("alibi", "rope", "t5", "nope"):
        hfpos.patch(model, scheme)
        learned_weights(model)
        wide = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
        assert_close(wide, model(input_ids=source[:, :23], decoder_input_ids=target).logits, rtol=0, atol=2e-5)
    hfpos.unpatch(model)
    assert torch.equal(model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits, stock)


@pytest.mark.parametrize("kind", ["T5EncoderModel", "T5Model", "T5ForTokenClassification"])
def test_heads(kind: str, tmp_path: Any) -> None:
    model = hfpos.patch(t5(kind), "alibi")
    assert hfpos.describe(model).proved
    inputs = {"input_ids": ids(9)} | ({"decoder_input_ids": ids(5)} if kind == "T5Model" else {})
    model.save_pretrained(tmp_path)
    again = hfpos.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert_close(again(**inputs)[0], model(**inputs)[0], rtol=0, atol=1e-5)


def test_gradient_checkpointing() -> None:
    model = hfpos.patch(t5(), "kerple").train()
    given = {"input_ids": ids(21), "labels": ids(9), "use_cache": False}

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**given).loss.backward()
        return [weight.grad for weight in model.parameters() if weight.requires_grad]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for one, other in zip(gradients(), plain, strict=True):
        assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_what_it_cannot_be_given() -> None:
    model = t5()
    before = model(input_ids=ids(9), decoder_input_ids=ids(5)).logits
    for scheme in ("fire", "dynamic"):
        given = {"original_length": 512} if scheme == "dynamic" else {}
        with pytest.raises(hfpos.PatchError, match=r"encoder: .*behind.*what works there: alibi"):
            hfpos.patch(model, scheme, **given)
    with pytest.raises(hfpos.PatchError, match="original_length="):
        hfpos.patch(model, "yarn", factor=4)
    assert torch.equal(model(input_ids=ids(9), decoder_input_ids=ids(5)).logits, before)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    with pytest.raises(hfpos.PatchError, match="LongT5LocalAttention computes attention in its own way"):
        hfpos.patch(transformers.LongT5Model(transformers.LongT5Config(**sizes)), "alibi")
