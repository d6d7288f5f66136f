"""Every misuse is a `PatchError` that says what was asked, what was found, what was expected and how to mend it, and changes nothing."""

import math

import pytest
import torch
import transformers

import hfpos
from tests.pairs import OWN_ATTENTION, Pair, unpatched
from tests.state import State, logits, structure


LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
CASES = [
    # names
    ("llama", "yarm", {"factor": 4}, "unknown scheme 'yarm': did you mean 'yarn'? Available: abf, alibi"),
    (
        "llama",
        "yarn",
        {"fctor": 4},
        "'yarn' has no parameter 'fctor': did you mean 'factor'? Available: attention_factor",
    ),
    (
        "llama",
        "yarn",
        {"factor": 4, "attn_factor": 1},
        "'yarn' has no parameter 'attn_factor': did you mean 'attention_factor'?",
    ),
    ("llama", "nope", {"factor": 4}, "'nope' has no parameter 'factor': 'nope' takes no parameters"),
    ("gpt2", "learned", {}, "learned: how long the table is to be is not given; pass target_length="),
    ("llama", "longrope", {"factor": 4}, "'longrope' needs short_factor and long_factor, which were not given"),
    # numbers
    *(
        (
            "llama",
            scheme,
            {"factor": factor},
            f"{scheme}: factor={factor!r} is not usable; expected a finite number >= 1",
        )
        for scheme in ("linear", "yarn", "alibi")
        for factor in (0, -2, math.nan, math.inf, "4", True, [4], 1 + 1j)
    ),
    ("llama", "yarn", {"factor": 0.5}, "yarn: factor=0.5 is not usable; expected a finite number >= 1"),
    ("llama", "yarn", {"target_length": 0}, "target_length=0 is not usable; expected a whole number of tokens >= 1"),
    (
        "llama",
        "yarn",
        {"target_length": 128.0},
        "target_length=128.0 is not usable; expected a whole number of tokens >= 1",
    ),
    (
        "llama",
        "yarn",
        {"target_length": 16},
        "target_length=16 is shorter than the original length 32; a scaling extends the context",
    ),
    (
        "llama",
        "yarn",
        {"factor": 4, "original_length": -1},
        "original_length=-1 is not usable; expected a whole number",
    ),
    (
        "llama",
        "yarn",
        {"factor": 4, "beta_fast": 1, "beta_slow": 2},
        "yarn: beta_fast=1 is below beta_slow=2; beta_fast counts",
    ),
    ("llama", "yarn", {"factor": 4, "beta_slow": 0}, "yarn: beta_slow=0 is not usable; expected a finite number > 0"),
    ("llama", "yarn", {"factor": 4, "truncate": "no"}, "yarn: truncate='no' is not usable; expected True or False"),
    (
        "llama",
        "yarn",
        {"factor": 4, "mscale": 1.0},
        "mscale=1.0 and mscale_all_dim=None take effect only together; give both",
    ),
    ("llama", "yarn", {"factor": 4, "attention_factor": 0}, "yarn: attention_factor=0 is not usable"),
    (
        "llama",
        "llama3",
        {"factor": 4, "low_freq_factor": 4},
        "llama3: high_freq_factor=4.0 must be above low_freq_factor=4",
    ),
    ("llama", "abf", {"theta": 1}, "abf: theta=1 is not usable; expected a finite number > 1"),
    ("llama", "rope", {"theta": -1}, "rope: theta=-1 is not usable; expected a finite number > 1"),
    ("llama", "partial", {"fraction": 1.5}, "partial: fraction=1.5 is not usable; expected a number in (0, 1]"),
    (
        "llama",
        "partial",
        {"fraction": 0.01},
        "of 16 rotary dimensions leaves no pair to rotate; raise it, or use 'nope'",
    ),
    (
        "llama",
        "dynamic",
        {"factor": 4, "cache": "exakt"},
        "dynamic: cache='exakt' is unknown: did you mean 'exact'? Available: exact, pinned",
    ),
    (
        "llama",
        "longrope",
        {**LONG, "factor": 4, "long_factor": [1.0] * 7},
        "longrope: long_factor has 7 entries, the model has 8 frequencies",
    ),
    ("llama", "longrope", {**LONG, "factor": 4, "long_factor": [0.0] * 8}, "longrope: long_factor=0.0 is not usable"),
    ("llama", "alibi", {"slopes": [0.5]}, "alibi: 1 values of slopes were given, the model has 4 attention heads"),
    (
        "llama",
        "alibi",
        {"slopes": [0.5, 0.4, 0.3, math.nan]},
        "alibi: slopes=nan is not usable; expected a finite number >= 0",
    ),
    (
        "gpt2",
        "learned",
        {"target_length": 64, "init": "copi"},
        "learned: init='copi' is unknown: did you mean 'copy'?",
    ),
    # lengths
    (
        "llama",
        "yarn",
        {"factor": 4, "target_length": 128},
        "both factor=4 and target_length=128 were given; give one of them",
    ),
    ("llama", "yarn", {}, "how far to extend is not given; pass factor= (e.g. 4) or target_length= (tokens)"),
    (
        "llama",
        "yarn",
        {"factor": 4, "original_length": 64},
        "original_length=64 conflicts with max_position_embeddings=32 of the model's config",
    ),
    ("bloom", "yarn", {"factor": 4}, "the model's config does not state a context length; pass original_length="),
    # pairs of scheme and model that make no sense
    (
        "llama",
        "learned",
        {"target_length": 64, "init": "interpolate"},
        "learned: init='interpolate' is for a model that has a table of positions, and there is none to start from",
    ),
    ("bloom", "learned", {}, "learned: how long the table is to be is not known; pass target_length="),
]


def build(model_type):
    return unpatched(model_type, seq_length=None) if model_type in OWN_ATTENTION else unpatched(model_type)


def describe_case(case):
    return "-".join([*case[:2], *(f"{key}={value}" for key, value in case[2].items())])


@pytest.mark.parametrize("case", CASES, ids=describe_case)
def test_wrong_parameters(case):
    model_type, scheme, parameters, message = case
    model = build(model_type)
    before = State(model)
    with pytest.raises(hfpos.PatchError) as caught:
        hfpos.patch(model, scheme, **parameters)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert State(model).differences(before) == []


def test_all_errors_are_of_one_class():
    assert issubclass(hfpos.PatchError, RuntimeError)


def test_scheme_that_is_none():
    model = unpatched("llama")
    before = State(model)
    for scheme, parameters, message in (
        (None, {}, "scheme is a NoneType; expected a name such as 'yarn' or a scheme object"),
        (hfpos.schemes.Yarn, {"factor": 4}, "scheme is a type; expected a name such as 'yarn' or a scheme object"),
        (
            hfpos.schemes.Yarn(factor=4),
            {"factor": 8},
            r"yarn\(factor=4\) was given as an object and factor beside it; put",
        ),
    ):
        with pytest.raises(hfpos.PatchError, match=message):
            hfpos.patch(model, scheme, **parameters)
    assert State(model).differences(before) == []


# Configs


def rope(**parameters):
    return {"rope_theta": 10_000.0} | parameters


@pytest.mark.parametrize(
    ("settings", "parameters", "message"),
    [
        (
            {"rope_parameters": rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)},
            {"factor": 2},
            "original_max_position_embeddings=64 but max_position_embeddings=32, which is shorter; correct one of them",
        ),
        (
            {
                "rope_parameters": rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
                "max_position_embeddings": 128,
            },
            {"factor": 2, "original_length": 128},
            "original_length=128 conflicts with original_max_position_embeddings=32 of the model's config",
        ),
        (
            {"rope_parameters": rope(rope_type="linear", factor=4.0), "max_position_embeddings": 128},
            {"factor": 2},
            "already scaled (linear, factor 4.0) and its config does not state the length it was pretrained at; pass original_length=",
        ),
    ],
)
def test_lengths_that_do_not_fit_together(settings, parameters, message):
    model = unpatched("llama", **settings)
    before = State(model)
    with pytest.raises(hfpos.PatchError) as caught:
        hfpos.patch(model, "yarn", **parameters)
    assert message in str(caught.value)
    assert State(model).differences(before) == []


def test_length_of_a_scaled_model_given():
    parameters = rope(rope_type="linear", factor=4.0)
    model = unpatched("llama", rope_parameters=parameters, max_position_embeddings=128)
    hfpos.patch(model, "yarn", factor=4, original_length=32)
    assert torch.equal(logits(model, 60), logits(Pair("llama", "yarn", {"factor": 4}).model(), 60))


def test_config_of_an_unknown_rope_type():
    model = unpatched("llama")
    model.config.rope_parameters["rope_type"] = "yaarn"
    before = State(model)
    for scheme, parameters in (("yarn", {"factor": 4}), ("alibi", {}), ("nope", {})):
        with pytest.raises(
            hfpos.PatchError,
            match="rope_type 'yaarn' is unknown to Transformers; expected one of default, dynamic, .*correct",
        ):
            hfpos.patch(model, scheme, **parameters)
    assert State(model).differences(before) == []


def test_config_without_theta():
    model = unpatched("llama")
    del model.config.rope_parameters["rope_theta"]
    before = State(model)
    with pytest.raises(
        hfpos.PatchError, match=r"have no rope_theta: \{'rope_type': 'default'\}; set it before the model is built"
    ):
        hfpos.patch(model, "yarn", factor=4)
    assert State(model).differences(before) == []


# Models


def test_models_that_fit_no_family():
    config = transformers.OpenAIGPTConfig(n_embd=16, n_head=2, n_layer=1, vocab_size=16, n_positions=8)
    model = transformers.OpenAIGPTLMHeadModel(config)
    before = structure(model)
    reasons = (
        r"learned_table: it has no table of positions .*rotary: it has no rotary embedding.*the families are .*bloom"
    )
    with pytest.raises(hfpos.PatchError, match=rf"OpenAIGPTLMHeadModel fits no family \(.*{reasons}"):
        hfpos.patch(model, "yarn", factor=4)
    assert structure(model) == before


def test_things_that_are_no_model():
    for thing in (torch.nn.Linear(2, 2), "llama", None):
        with pytest.raises(
            hfpos.PatchError,
            match=f"found no Transformers model in {type(thing).__name__}; expected a PreTrainedModel",
        ):
            hfpos.patch(thing, "nope")


def test_unpatching_what_is_not_patched():
    model = unpatched("llama")
    with pytest.raises(
        hfpos.PatchError, match=r"LlamaForCausalLM is not patched, there is nothing to take out; hfpos\.describe"
    ):
        hfpos.unpatch(model)


def test_attention_that_cannot_carry_a_bias():
    model = unpatched("llama")
    model.config._attn_implementation = "flex_attention"
    before = structure(model)
    for scheme in ("dynamic", "fire"):
        with pytest.raises(
            hfpos.PatchError,
            match=r"implementation 'flex_attention' cannot carry this scheme.*set_attn_implementation",
        ):
            hfpos.patch(model, scheme, **({"factor": 4} if scheme == "dynamic" else {}))
    assert structure(model) == before
    hfpos.patch(model, "nope", prove=False)  # which needs nothing of it


class QuantisedEmbedding(torch.nn.Module):
    """As a quantiser leaves a table behind: whole numbers, and no `nn.Embedding` any more."""

    def __init__(self, table):
        super().__init__()
        self.scale = table.weight.detach().abs().max().item() / 127
        self.weight = torch.nn.Parameter((table.weight.detach() / self.scale).to(torch.int8), requires_grad=False)

    def forward(self, ids):
        return self.weight[ids].float() * self.scale


@pytest.mark.parametrize(
    ("scheme", "parameters", "message"),
    [
        (
            "learned",
            {"target_length": 64},
            "position table is a QuantisedEmbedding, which cannot be resized; expected a plain nn.Embedding",
        ),
        ("rope", {}, "position table is a QuantisedEmbedding, which cannot be switched off; expected an nn.Embedding"),
        ("nope", {}, "position table is a QuantisedEmbedding, which cannot be switched off; expected an nn.Embedding"),
    ],
)
def test_quantised_table(scheme, parameters, message):
    model = unpatched("gpt2")
    model.transformer.wpe = QuantisedEmbedding(model.transformer.wpe)
    before = State(model)
    with pytest.raises(hfpos.PatchError, match=message):
        hfpos.patch(model, scheme, **parameters)
    assert State(model).differences(before) == []


class QuantisedLinear(torch.nn.Module):
    """Whole numbers for weights."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.detach().abs().max().item() / 127
        self.register_buffer("quantised", (layer.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.quantised.to(x.dtype) * self.scale).T


@pytest.mark.parametrize(
    "pair", [Pair("llama", "yarn", {"factor": 4}), Pair("llama", "dynamic"), Pair("llama", "alibi")], ids=str
)
def test_quantised_model_where_it_can_work(pair):
    model = pair.unpatched()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, QuantisedLinear(getattr(layer.self_attn, name)))
    before = State(model)
    hfpos.patch(model, pair.scheme, **pair.parameters)
    assert hfpos.describe(model).proved
    assert (logits(model, 60) - logits(pair.model(), 60)).norm() < 0.1 * logits(model, 60).norm()
    assert State(hfpos.unpatch(model)).differences(before) == []


@pytest.mark.parametrize(
    ("settings", "scheme", "message"),
    [
        (
            {"reorder_and_upcast_attn": True},
            "rope",
            "GPT-2 with reorder_and_upcast_attn=True computes attention in its own way",
        ),
        (
            {"slow_but_exact": True, "pretraining_tp": 2},
            "alibi",
            "BLOOM with slow_but_exact=True sums its projections in slices",
        ),
    ],
)
def test_settings_that_stand_in_the_way(settings, scheme, message):
    model = unpatched("gpt2" if "reorder_and_upcast_attn" in settings else "bloom", **settings)
    before = structure(model)
    with pytest.raises(hfpos.PatchError, match=message):
        hfpos.patch(model, scheme)
    assert structure(model) == before
