"""The generic rotary decoder: what stands in the live model is what the scheme says, and nothing else has changed."""

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import hfpos
from hfpos.scheme import Geometry
from tests.pairs import PAIRS, Pair, tokens, unpatched
from tests.state import State, logits


FACTOR = {"factor": 4.0}


def geometry(rotary_dim, theta, length=32, head_dim=16):
    return Geometry(
        heads=4,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        theta=theta,
        trained_length=length,
        allowed_length=length,
    )


def rotary_of(model):
    return model.base_model.rotary_emb


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.model_type == "llama"], ids=str)
def test_frequencies_in_the_model_are_those_of_the_scheme(pair):
    scheme = hfpos.schemes()[pair.scheme].create(**pair.parameters)
    rotary = rotary_of(pair.model())
    if scheme.seam == "freq":
        inv_freq, scale = scheme.frequencies(geometry(16, 10_000.0))
        torch.testing.assert_close(rotary.inv_freq.double(), inv_freq, rtol=1e-6, atol=0)
        assert rotary.attention_scaling == pytest.approx(scale, rel=1e-9)
        torch.testing.assert_close(rotary.original_inv_freq.double(), inv_freq, rtol=1e-6, atol=0)
    elif scheme.seam != "layers":  # where the first table is the model's own
        assert not rotary.inv_freq.any()
        assert rotary.attention_scaling == 1.0
    assert rotary.inv_freq.dtype == torch.float32
    assert not list(rotary.state_dict())


STOCK = {
    "linear": {},
    "yarn": {"original_max_position_embeddings": 32},
    "llama3": {"original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {},
}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2"])
@pytest.mark.parametrize("scheme", ["linear", "yarn", "llama3"])
def test_equal_to_a_model_that_stock_transformers_builds_so(model_type, scheme):
    """With a theta that is not the default, which is how a lost theta shows."""
    theta = {"rope_theta": 5e5}
    patched = unpatched(model_type, rope_parameters={"rope_type": "default"} | theta)
    hfpos.patch(patched, scheme, **FACTOR)
    stock = {"rope_type": scheme, "factor": 4.0} | STOCK[scheme] | theta
    built = unpatched(model_type, rope_parameters=stock, max_position_embeddings=128)
    assert torch.equal(logits(patched, 100), logits(built, 100))
    assert patched.config.max_position_embeddings == 128
    for key, value in stock.items():
        assert patched.config.rope_parameters[key] == value


@pytest.mark.parametrize("scheme", ["ntk", "dynamic_yarn", "partial", "abf", "longrope"])
def test_theta_is_kept(scheme):
    model = unpatched("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    factors = {"short_factor": [1.1] * 8, "long_factor": [2.2] * 8}
    parameters = {"abf": {"theta": 1e6}, "partial": {}}.get(scheme, FACTOR | (factors if scheme == "longrope" else {}))
    if scheme in ("dynamic_yarn", "longrope"):
        parameters = parameters | {"cache": "pinned"}
    hfpos.patch(model, scheme, **parameters)
    inv_freq, _ = hfpos.schemes()[scheme].create(**parameters).frequencies(geometry(16, 5e5))
    torch.testing.assert_close(rotary_of(model).inv_freq.double(), inv_freq, rtol=1e-6, atol=0)


# Lengths


def test_both_orders_of_raising_the_limit():
    """A config whose limit was raised before the scaling looks as if it had been trained that long, unless it says otherwise."""
    expected, _ = hfpos.schemes.Yarn(factor=4).frequencies(geometry(16, 10_000.0))
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 32}
    for settings, parameters in (
        ({}, {"factor": 4}),
        ({}, {"target_length": 128}),
        ({}, {"factor": 4, "original_length": 32}),
        ({"max_position_embeddings": 128}, {"factor": 4, "original_length": 32}),
        ({"max_position_embeddings": 128}, {"target_length": 128, "original_length": 32}),
        ({"max_position_embeddings": 128, "rope_parameters": scaled}, {"factor": 4}),
        ({"max_position_embeddings": 128, "rope_parameters": scaled}, {"target_length": 128}),
    ):
        model = hfpos.patch(unpatched("llama", **settings), "yarn", **parameters, prove=False)
        torch.testing.assert_close(rotary_of(model).inv_freq.double(), expected, rtol=1e-6, atol=0)
        assert rotary_of(model).attention_scaling == pytest.approx(1.138629436)
        assert model.config.max_position_embeddings == 128
        assert model.config.rope_parameters["original_max_position_embeddings"] == 32


def test_scaled_model_is_scaled_anew_and_not_twice():
    once = Pair("llama", "yarn", FACTOR).model()
    scaled = unpatched(
        "llama",
        max_position_embeddings=128,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
        },
    )
    assert torch.equal(logits(scaled, 60), logits(once, 60))
    hfpos.patch(scaled, "linear", factor=2)
    assert torch.equal(logits(scaled, 60), logits(Pair("llama", "linear", {"factor": 2}).model(), 60))
    assert scaled.config.max_position_embeddings == 64
    hfpos.patch(scaled, "rope")
    assert torch.equal(logits(scaled, 60), logits(unpatched("llama"), 60))


def test_dynamic_beyond_the_limit_is_not_silently_unscaled():
    """Stock dynamic scaling does nothing once `max_position_embeddings` was raised."""
    model = hfpos.patch(
        unpatched("llama", max_position_embeddings=128), "dynamic", target_length=128, original_length=32
    )
    assert torch.equal(logits(model, 100), logits(Pair("llama", "dynamic", FACTOR).model(), 100))
    assert not torch.allclose(logits(model, 100), logits(unpatched("llama"), 100), atol=1e-2)


# Parameters nested by type of layer


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.model_type == "gemma3_text"], ids=str)
def test_sliding_layers_stay_as_they_are(pair):
    stock, model = pair.unpatched(), pair.model()
    before, after = (rotary_of(each).sliding_attention_inv_freq for each in (stock, model))
    scheme = hfpos.schemes()[pair.scheme].create(**pair.parameters)
    rotary = rotary_of(model)
    if scheme.seam in ("freq", "score"):
        assert torch.equal(before, after)
        assert rotary.sliding_attention_attention_scaling == 1.0
        sliding = [each.config.rope_parameters["sliding_attention"] for each in (stock, model)]
        assert sliding[0] == sliding[1]
        cos = [
            rotary_of(each)(torch.zeros(1, 1, 1), torch.arange(99)[None], "sliding_attention")[0]
            for each in (stock, model)
        ]
        assert torch.equal(*cos)
    else:
        assert not after.any()
    if scheme.seam == "freq":
        inv_freq, scale = scheme.frequencies(geometry(16, 1e6))
        torch.testing.assert_close(rotary.full_attention_inv_freq.double(), inv_freq, rtol=1e-6, atol=0)
        assert rotary.full_attention_attention_scaling == pytest.approx(scale, rel=1e-9)
    else:
        assert not rotary.full_attention_inv_freq.any()


def test_truncate_is_honoured_where_stock_does_not():
    settings = FACTOR | {"beta_slow": 0.1}
    rounded, exact = (
        Pair("gemma3_text", "yarn", settings | {"truncate": truncate}).model() for truncate in (True, False)
    )
    expected, _ = hfpos.schemes.Yarn(**settings, truncate=False).frequencies(geometry(16, 1e6))
    torch.testing.assert_close(rotary_of(exact).full_attention_inv_freq.double(), expected, rtol=1e-6, atol=0)
    assert not torch.equal(rotary_of(exact).full_attention_inv_freq, rotary_of(rounded).full_attention_inv_freq)
    assert (hfpos.describe(rounded).stock_loadable, hfpos.describe(exact).stock_loadable) == (True, False)
    exact.config.rope_parameters["full_attention"] |= {
        "rope_type": "yarn",
        "truncate": False,
        "beta_slow": 0.1,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    stock, _ = ROPE_INIT_FUNCTIONS["yarn"](exact.config, "cpu", layer_type="full_attention")
    assert torch.equal(stock, rotary_of(rounded).full_attention_inv_freq)  # if this fails, Transformers has mended it


# Heads that are rotated in part


@pytest.mark.parametrize(("model_type", "rotary_dim"), [("gpt_neox", 4), ("phi", 8), ("glm", 8)])
@pytest.mark.parametrize("scheme", ["linear", "yarn", "ntk", "dynamic"])
def test_rotary_dimension_is_not_the_head_dimension(model_type, rotary_dim, scheme):
    parameters = FACTOR | ({"cache": "pinned"} if scheme == "dynamic" else {})
    model = Pair(model_type, scheme, parameters).model()
    assert model.hfpos_record.geometry.rotary_dim == rotary_dim
    inv_freq, scale = hfpos.schemes()[scheme].create(**parameters).frequencies(geometry(rotary_dim, 10_000.0))
    torch.testing.assert_close(rotary_of(model).inv_freq.double(), inv_freq, rtol=1e-6, atol=0)
    cos, sin = rotary_of(model)(torch.zeros(1, 1, 1), torch.arange(99)[None])
    assert cos.shape[-1] == sin.shape[-1] == rotary_dim
    assert cos[0, 0].tolist() == pytest.approx([scale] * rotary_dim)


@pytest.mark.parametrize("model_type", ["gpt_neox", "phi", "glm"])
def test_dimensions_that_are_not_rotated_stay_bit_equal(model_type):
    """Queries and keys as attention gets them, before and after patching."""
    seen = {}

    def spy(name):
        def attention(module, query, key, value, *args, **kwargs):
            seen.setdefault(name, []).append((query, key))
            return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2) * 0, None

        return attention

    from transformers.modeling_utils import AttentionInterface

    for name in ("before", "after"):
        AttentionInterface.register(name, spy(name))
        model = unpatched(model_type)
        if name == "after":
            hfpos.patch(model, "yarn", **FACTOR)
        model.config._attn_implementation = name
        with torch.no_grad():
            model(tokens(1, 20))
    rotated = model.hfpos_record.geometry.rotary_dim
    for pair in zip(seen["before"], seen["after"], strict=True):
        for before, after in zip(*pair, strict=True):
            assert torch.equal(before[..., rotated:], after[..., rotated:])
            assert not torch.equal(before[..., :rotated], after[..., :rotated])


def test_temperature_multiplies_the_logits():
    """YaRN's factor is on cos and sin, so its square is on every logit: at distance 0 the rotation itself drops out."""
    model = Pair("llama", "yarn", FACTOR).model()
    cos, sin = rotary_of(model)(torch.zeros(1, 1, 1), torch.arange(50)[None])
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, hfpos.describe(model).logit_multiplier))
    assert hfpos.describe(model).logit_multiplier == pytest.approx(1.138629436**2)


# Other models


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "phi",
        "phi3",
        "olmo2",
        "gpt_neox",
        "glm",
        "cohere",
    ],
)
def test_family_and_back(model_type):
    limits = {"original_max_position_embeddings": 32} if model_type == "phi3" else {}
    model = unpatched(model_type, **limits)
    assert hfpos.describe(model).family == "rotary"
    before = State(model)
    for scheme, parameters in (("yarn", FACTOR), ("alibi", {}), ("nope", {})):
        hfpos.patch(model, scheme, **parameters)
        assert hfpos.describe(model).proved
    hfpos.unpatch(model)
    assert State(model).differences(before) == []


def test_schemes_without_rotation_do_not_rotate():
    """Shifting the ids of all tokens changes nothing where only distances count, and permuting a prefix nothing without positions."""
    nope = Pair("llama", "nope").model()
    ids = tokens(1, 20)
    with torch.no_grad():
        at_zero = nope(ids).logits
        torch.testing.assert_close(
            nope(ids, position_ids=torch.arange(500, 520)[None]).logits, at_zero, rtol=0, atol=1e-5
        )
        # one layer sees its prefix as a set, so a second layer's tokens must be compared at the last position of one
        single = hfpos.patch(unpatched("llama", num_hidden_layers=1), "nope")
        shuffled = torch.cat((ids[:, torch.randperm(19)], ids[:, 19:]), dim=1)
        torch.testing.assert_close(single(shuffled).logits[:, -1], single(ids).logits[:, -1], rtol=0, atol=1e-5)
