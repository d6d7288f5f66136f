"""The engine: what `patch` puts in, `unpatch` takes out, and what an error in between leaves behind."""

import copy
import io
import pickle
import time

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel, LlamaRotaryEmbedding

import hfpos
from hfpos.plan import Attribute
from tests.cases import SCALED, cases
from tests.state import State, logits, tokens
from tests.tiny import tiny


FEW = [("llama", "yarn"), ("llama", "dynamic"), ("llama", "alibi"), ("gpt2", "yarn"), ("bloom", "rope")]


def patched_model(model_type, scheme):
    parameters = SCALED.get(scheme, {})
    return hfpos.patch(tiny(model_type), scheme, **parameters | ({"original_length": 64} if model_type == "bloom" and parameters else {}))


@pytest.mark.parametrize(("model_type", "scheme", "parameters"), cases())
def test_unpatch_gives_the_original_back(model_type, scheme, parameters):
    model = tiny(model_type)
    before = State(model)
    assert hfpos.patch(model, scheme, **parameters) is model
    description = hfpos.describe(model)
    assert (description.scheme, description.patched) == (scheme, True)
    assert description.proved or (model_type, scheme, parameters) == ("bloom", "alibi", {})  # which is what it had
    assert hfpos.unpatch(model) is model
    assert State(model).differences(before) == []


@pytest.mark.parametrize(("model_type", "scheme", "parameters"), cases("llama", "gpt2", "bloom"))
def test_other_models_stay_as_they_are(model_type, scheme, parameters):
    model = tiny(model_type)
    of_same_class = tiny(model_type, seed=1)
    of_same_config = type(model)(model.config).eval()
    before = State(of_same_class), State(of_same_config)
    assert of_same_config.config is model.config
    hfpos.patch(model, scheme, **parameters)
    assert State(of_same_class).differences(before[0]) == []
    assert State(of_same_config).differences(before[1]) == []


def test_nothing_of_a_class_is_replaced():
    classes = (LlamaAttention, LlamaRotaryEmbedding, LlamaModel, transformers.LlamaForCausalLM, transformers.LlamaConfig)
    before = [dict(vars(cls)) for cls in classes]
    for scheme in ("yarn", "dynamic", "alibi", "nope", "sinusoidal"):
        patched_model("llama", scheme)
    assert [dict(vars(cls)) for cls in classes] == before


def test_patch_again_replaces():
    model = tiny("llama")
    before = State(model)
    for scheme, parameters in [("yarn", {"factor": 4}), ("alibi", {}), ("linear", {"factor": 8}), ("dynamic", {}), ("nope", {})]:
        hfpos.patch(model, scheme, **parameters)
        assert torch.equal(logits(model, 100), logits(hfpos.patch(tiny("llama"), scheme, **parameters), 100))
        assert hfpos.describe(model).trained_length == 64
    hfpos.unpatch(model)
    assert State(model).differences(before) == []


def test_failed_patch_keeps_the_one_before():
    model = patched_model("llama", "yarn")
    before = State(model)
    with pytest.raises(hfpos.PatchError, match="both factor"):
        hfpos.patch(model, "linear", factor=2, target_length=512)
    with pytest.raises(hfpos.PatchError, match="conflicts"):
        hfpos.patch(model, "linear", factor=2, original_length=32_000)
    with pytest.raises(hfpos.PatchError, match="short_factor has 3 entries"):
        hfpos.patch(model, "longrope", factor=2, short_factor=[1.0] * 3, long_factor=[1.0] * 3)
    assert State(model).logits.equal(before.logits)
    assert hfpos.describe(model).scheme == "yarn"
    hfpos.unpatch(model)
    assert torch.equal(logits(model), logits(tiny("llama")))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("scheme", ["yarn", "alibi"])
def test_error_in_the_middle_of_applying_changes_nothing(model_type, scheme, monkeypatch):
    parameters = {"factor": 4, "original_length": 64} if scheme == "yarn" else {"factor": 2}
    model = tiny(model_type)
    before = State(model)
    applied = []

    def counting(edit, original):
        applied.append(edit)
        if len(applied) == failing:
            raise OSError("out of luck")
        return original(edit)

    for cls in hfpos.plan.Edit.__args__:
        monkeypatch.setattr(cls, "apply", lambda edit, original=cls.apply: counting(edit, original))
    failing = 0
    hfpos.unpatch(hfpos.patch(model, scheme, **parameters))
    for failing in range(1, len(applied) + 1):
        applied.clear()
        with pytest.raises(OSError, match="out of luck"):
            hfpos.patch(model, scheme, **parameters)
        assert len(applied) == failing
        assert State(model).differences(before) == []


def test_patched_restores_also_after_an_exception():
    model = tiny("llama")
    before = State(model)
    with hfpos.patched(model, "yarn", factor=4) as inside:
        assert inside is model
        assert hfpos.describe(model).scheme == "yarn"
    assert State(model).differences(before) == []
    with pytest.raises(KeyError), hfpos.patched(model, hfpos.schemes.Linear(factor=2)):
        raise KeyError
    assert State(model).differences(before) == []


def test_patched_restores_the_patch_before():
    model = patched_model("llama", "yarn")
    before = State(model)
    with hfpos.patched(model, "alibi"), hfpos.patched(model, "nope"):
        assert hfpos.describe(model).scheme == "nope"
    assert hfpos.describe(model).scheme == "yarn"
    assert torch.equal(logits(model), before.logits)
    with pytest.raises(hfpos.PatchError), hfpos.patched(model, "yarm", factor=4):
        pass
    assert hfpos.describe(model).scheme == "yarn"
    hfpos.unpatch(model)
    assert torch.equal(logits(model), logits(tiny("llama")))


def test_patched_leaves_alone_a_patch_made_inside():
    model = tiny("llama")
    before = State(model)
    with hfpos.patched(model, "yarn", factor=4):
        hfpos.patch(model, "alibi")
    assert State(model).differences(before) == []
    with hfpos.patched(model, "yarn", factor=4):
        hfpos.unpatch(model)
    assert State(model).differences(before) == []


# ---- copies


def by_torch(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIERS = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch": by_torch}


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize(("model_type", "scheme"), [*FEW, ("gemma3_text", "yarn"), ("gpt2", "nope")])
def test_copy_of_a_patched_model(model_type, scheme, copier):
    model = patched_model(model_type, scheme)
    before = State(model)
    twin = copier(model)
    assert torch.equal(logits(twin), before.logits)
    if model_type != "gpt2":
        assert torch.equal(logits(twin, 100), logits(model, 100))
    assert type(twin.config) is type(model.config)
    hfpos.unpatch(twin)
    assert torch.equal(logits(twin), logits(tiny(model_type)))
    assert State(model).differences(before) == []
    assert twin.config.to_dict() == tiny(model_type).config.to_dict()
    assert type(twin.config) is type(tiny(model_type).config)


def test_copy_made_before_patching_is_another_model():
    model = tiny("llama")
    twin = copy.deepcopy(model)
    before = State(twin)
    hfpos.patch(model, "yarn", factor=4)
    assert State(twin).differences(before) == []


# ---- dtypes


def cos_sin_at(model, positions):
    """What the model's own rotary module gives in float32."""
    rotary = model.base_model.rotary_emb
    types = {"layer_type": "full_attention"} if hasattr(rotary, "layer_types") else {}
    return torch.stack(rotary(torch.zeros(1, 1, 1), torch.tensor([positions]), **types))


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "half float": lambda model: model.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox", "phi3"])
@pytest.mark.parametrize("scheme", ["yarn", "partial", "linear"])
def test_frequencies_stay_float32(model_type, scheme, cast):
    model = hfpos.patch(tiny(model_type), scheme, **SCALED.get(scheme, {}))
    positions = [0, 1, 4095, 32_767, 131_071]
    before = cos_sin_at(model, positions)
    cast(model)
    assert next(model.parameters()).dtype == torch.bfloat16 or cast not in (CASTS["to"], CASTS["bfloat16"])
    buffers = dict(model.base_model.rotary_emb.named_buffers())
    assert {buffer.dtype for name, buffer in buffers.items() if name.endswith("inv_freq")} == {torch.float32}
    torch.testing.assert_close(cos_sin_at(model, positions), before, rtol=0, atol=1e-6)


def test_cast_before_patching_too():
    model = hfpos.patch(tiny("llama").bfloat16(), "yarn", factor=4)
    expected = hfpos.patch(tiny("llama"), "yarn", factor=4)
    assert torch.equal(cos_sin_at(model, [131_071]), cos_sin_at(expected, [131_071]))
    assert model.base_model.rotary_emb.inv_freq.dtype == torch.float32
    before = tiny("llama").bfloat16()
    assert torch.equal(logits(hfpos.unpatch(model)), logits(before))
    assert model.base_model.rotary_emb.inv_freq.dtype == before.base_model.rotary_emb.inv_freq.dtype


@pytest.mark.parametrize(("model_type", "scheme", "parameters"), cases("llama", "gpt2", "bloom"))
def test_bfloat16_is_only_rounding_away(model_type, scheme, parameters):
    model = hfpos.patch(tiny(model_type), scheme, **parameters)
    exact = logits(model)
    rough = logits(model.bfloat16())
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).norm() / exact.norm()
    assert error < 0.05
    moved = hfpos.unpatch(model)
    assert torch.equal(logits(moved), logits(tiny(model_type).bfloat16()))


@pytest.mark.parametrize("scheme", ["alibi", "dynamic", "sinusoidal"])
def test_score_and_bias_in_half_and_double(scheme):
    model = patched_model("llama", scheme)
    exact = logits(model, 100)
    double = logits(model.double(), 100)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), exact, rtol=0, atol=1e-4)
    half = logits(model.half(), 100)
    assert half.dtype == torch.float16
    assert (half.float() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("constructor", ["arange", "tensor"])
@pytest.mark.parametrize(("model_type", "scheme"), [*FEW, ("llama", "longrope"), ("gpt2", "learned")])
def test_constructors_that_return_bfloat16(model_type, scheme, constructor, monkeypatch):
    """As inside DeepSpeed's `zero.Init`, which makes every new floating tensor one of the model's dtype."""
    parameters = {"target_length": 600} if scheme == "learned" else SCALED.get(scheme, {})
    model, expected = tiny(model_type), tiny(model_type)
    original = getattr(torch, constructor)

    def rounded(*args, **kwargs):
        made = original(*args, **kwargs)
        return made.bfloat16() if made.is_floating_point() else made

    with monkeypatch.context() as context:
        context.setattr(torch, constructor, rounded)
        hfpos.patch(model, scheme, prove=False, **parameters)
    hfpos.patch(expected, scheme, **parameters)
    assert torch.equal(logits(model, 60), logits(expected, 60))


# ---- proof


def test_patch_that_does_nothing_is_refused(monkeypatch):
    model = tiny("llama")
    before = State(model)
    monkeypatch.setattr("hfpos.families._rotary.RotaryDecoder.rotary_edits", lambda self, *args: ([], False, {}))
    with pytest.raises(hfpos.PatchError, match="did not change the logits of LlamaForCausalLM.*prove=False"):
        hfpos.patch(model, "yarn", factor=4)
    assert State(model).differences(before) == []
    hfpos.patch(model, "yarn", factor=4, prove=False)
    assert not hfpos.describe(model).proved


def test_patch_that_does_nothing_keeps_the_one_before(monkeypatch):
    model = patched_model("llama", "linear")
    before = logits(model)
    monkeypatch.setattr("hfpos.families._rotary.RotaryDecoder.rotary_edits", lambda self, *args: ([], False, {}))
    with pytest.raises(hfpos.PatchError, match="did not change"):
        hfpos.patch(model, "yarn", factor=4)
    assert hfpos.describe(model).scheme == "linear"
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("scheme", ["linear", "ntk", "ntk_by_parts", "yarn", "llama3"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox"])
def test_factor_one_is_the_identity_and_no_error(model_type, scheme):
    model = hfpos.patch(tiny(model_type), scheme, factor=1)
    assert not hfpos.describe(model).proved
    assert torch.equal(logits(model, 60), logits(tiny(model_type), 60))


def test_identity_on_bloom_and_on_llama():
    bloom = hfpos.patch(tiny("bloom"), "alibi")
    torch.testing.assert_close(logits(bloom), logits(tiny("bloom")), rtol=0, atol=1e-5)
    llama = hfpos.patch(tiny("llama"), "rope")
    assert torch.equal(logits(llama), logits(tiny("llama")))
    assert torch.equal(logits(hfpos.patch(tiny("llama"), "partial", fraction=1)), logits(tiny("llama")))


def test_prove_leaves_no_trace():
    model = tiny("llama").train()
    model.base_model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    generator = torch.get_rng_state()
    hfpos.patch(model, "yarn", factor=4)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stock_dynamic_rope_is_put_back_with_what_it_remembered():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model, twin = tiny("llama", rope_parameters=rope), tiny("llama", rope_parameters=rope)
    logits(model, 100)
    logits(twin, 100)
    hfpos.unpatch(hfpos.patch(model, "yarn", factor=4))
    assert torch.equal(logits(model, 50), logits(twin, 50))  # stock keeps the frequencies of the longer call


# ---- wrappers and states that a model may be in


@pytest.mark.parametrize("compiled", ["module", "method"])
def test_compiled_model_is_refused(compiled):
    model = tiny("llama")
    before = State(model)
    if compiled == "module":
        wrapped = torch.compile(model)
    else:
        wrapped = model
        model.compile()
    with pytest.raises(hfpos.PatchError, match=r"is compiled.*patch first, then torch\.compile"):
        hfpos.patch(wrapped, "yarn", factor=4)
    model._compiled_call_impl = None
    assert State(model).differences(before) == []


def test_not_a_transformers_model():
    for thing in (torch.nn.Linear(2, 2), "llama", None):
        with pytest.raises(hfpos.PatchError, match="found no Transformers model in"):
            hfpos.patch(thing, "nope")


def test_decoder_without_a_head_and_a_wrapper_of_ones_own():
    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

    model = tiny("llama")
    wrapper = Wrapper(model)
    assert hfpos.patch(wrapper, "yarn", factor=4) is wrapper
    assert torch.equal(logits(model, 100), logits(patched_model("llama", "yarn"), 100))
    with pytest.raises(hfpos.PatchError, match="not patched"):
        hfpos.unpatch(tiny("llama"))
    hfpos.unpatch(wrapper)
    assert torch.equal(logits(model), logits(tiny("llama")))

    for model_type, scheme in (("llama", "yarn"), ("gpt2", "rope"), ("bloom", "nope")):
        full = patched_model(model_type, scheme)
        bare = hfpos.patch(tiny(model_type).base_model, scheme, **SCALED.get(scheme, {}))
        with torch.no_grad():
            hidden = full.base_model(tokens(60)).last_hidden_state
            assert torch.equal(bare(tokens(60)).last_hidden_state, hidden)


@pytest.mark.parametrize(("model_type", "scheme"), [*FEW, ("gpt2", "nope"), ("gpt2", "learned"), ("gpt_neox", "yarn"), ("gemma3_text", "linear")])
@pytest.mark.parametrize("fill", ["to_empty", "assign"])
def test_patched_on_meta_and_filled_later(model_type, scheme, fill):
    parameters = {"target_length": 96} if scheme == "learned" else SCALED.get(scheme, {})
    parameters = parameters | ({"original_length": 64} if model_type == "bloom" and parameters else {})
    full = tiny(model_type)
    expected = hfpos.patch(tiny(model_type), scheme, **parameters)
    with torch.device("meta"):
        model = type(full)(full.config).eval()
    hfpos.patch(model, scheme, **parameters)
    assert not hfpos.describe(model).proved
    if fill == "to_empty":
        model.to_empty(device="cpu")
        model.load_state_dict(expected.state_dict())
    else:
        model.load_state_dict(expected.state_dict(), assign=True)
        model.tie_weights()
    assert torch.equal(logits(model), logits(expected))
    if scheme != "learned":
        hfpos.unpatch(model)
        assert torch.equal(logits(model), logits(full))
        assert not any(parameter.is_meta for parameter in [*model.parameters(), *model.buffers()])


def test_large_model_on_meta_is_patched_at_once():
    config = transformers.LlamaConfig(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, max_position_embeddings=4096)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    hfpos.unpatch(hfpos.patch(model, "yarn", factor=8))
    for scheme, parameters in (("yarn", {"factor": 8}), ("alibi", {}), ("dynamic", {})):
        start = time.perf_counter()
        hfpos.patch(model, scheme, **parameters)
        assert time.perf_counter() - start < 0.2
        hfpos.unpatch(model)


def test_head_dim_and_heads_of_a_grouped_model_are_read():
    model = tiny("llama", head_dim=32)
    hfpos.patch(model, "yarn", factor=4)
    assert model.base_model.rotary_emb.inv_freq.shape == (16,)
    hfpos.patch(model, "alibi", slopes=[0.5, 0.4, 0.3, 0.2])


def test_plan_says_what_changes():
    model = patched_model("llama", "yarn")
    plan = str(model.hfpos_record.plan)
    assert "LlamaModel.rotary_emb: LlamaRotaryEmbedding -> FixedRotary" in plan
    assert "LlamaForCausalLM.config: LlamaConfig -> LlamaConfig" in plan
    assert all(isinstance(edit, Attribute) or edit.handle for edit in model.hfpos_record.plan.edits)
