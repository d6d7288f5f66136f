"""The engine: what `patch` puts in, `unpatch` takes out, and what an error in between leaves behind."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel, LlamaRotaryEmbedding

import hfpos
from hfpos.plan import Edit
from tests.pairs import OWN_ATTENTION, PAIRS, WAYS, Pair, tokens, unpatched
from tests.state import State, logits, structure


YARN = Pair("llama", "yarn", {"factor": 4})
FEW = [
    YARN,
    Pair("gemma3_text", "yarn", {"factor": 4}),
    Pair("llama", "dynamic", {"factor": 4}),
    Pair("llama", "alibi"),
    Pair("gpt2", "yarn", {"factor": 4}),
    Pair("gpt2", "nope"),
    Pair("bloom", "rope"),
]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_unpatch_gives_the_original_back(pair):
    model = pair.unpatched()
    before = State(model)
    assert hfpos.patch(model, pair.scheme, **pair.parameters) is model
    description = hfpos.describe(model)
    assert (description.scheme, description.patched) == (pair.scheme, True)
    assert description.proved or str(pair) in ("bloom-alibi", "falcon-alibi", "mpt-alibi")  # which is what it had
    assert hfpos.unpatch(model) is model
    assert State(model).differences(before) == []


@pytest.mark.parametrize("pair", WAYS, ids=str)
def test_other_models_stay_as_they_are(pair):
    model = pair.unpatched()
    of_same_class = unpatched(pair.model_type, initializer_range=0.1)
    of_same_config = type(model)(model.config).eval()
    assert of_same_config.config is model.config
    before = State(of_same_class), State(of_same_config)
    hfpos.patch(model, pair.scheme, **pair.parameters)
    assert State(of_same_class).differences(before[0]) == []
    assert State(of_same_config).differences(before[1]) == []


@pytest.mark.parametrize("pair", FEW, ids=str)
def test_weights_keep_their_names_and_identities(pair):
    """For checkpoints and for optimizers that were made before."""
    model = pair.unpatched()
    keys, weights = list(model.state_dict()), [id(weight) for weight in model.parameters()]
    hfpos.patch(model, pair.scheme, **pair.parameters)
    assert list(model.state_dict()) == keys
    assert [id(weight) for weight in model.parameters()] == weights


@pytest.mark.parametrize("pair", FEW, ids=str)
def test_weights_drawn_anew_leave_the_positions(pair):
    """Transformers' initialisation computes rotary modules anew from the config, where it knows them by their name."""
    model, expected = pair.model(), pair.model()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model.apply(model._init_weights)
    assert not torch.equal(logits(model), logits(expected))
    model.load_state_dict(weights)
    assert torch.equal(logits(model, 60), logits(expected, 60))


def test_nothing_of_a_class_is_replaced():
    classes = (
        LlamaAttention,
        LlamaRotaryEmbedding,
        LlamaModel,
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig,
    )
    before = [dict(vars(cls)) for cls in classes]
    for scheme, parameters in (("yarn", {"factor": 4}), ("dynamic", {}), ("alibi", {}), ("sinusoidal", {})):
        Pair("llama", scheme, parameters).model()
    for cls, attributes in zip(classes, before, strict=True):  # more may be there: Transformers caches on its classes
        assert {name: vars(cls)[name] for name in attributes} == attributes


def test_patching_again_replaces():
    model = unpatched("llama")
    before = State(model)
    for scheme, parameters in (("yarn", {"factor": 4}), ("alibi", {}), ("linear", {"factor": 8}), ("dynamic", {})):
        hfpos.patch(model, scheme, **parameters)
        assert torch.equal(logits(model, 100), logits(Pair("llama", scheme, parameters).model(), 100))
        assert hfpos.describe(model).trained_length == 32
    hfpos.unpatch(model)
    assert State(model).differences(before) == []


def test_failed_patch_keeps_the_one_before():
    model = YARN.model()
    before = logits(model, 100)
    for scheme, parameters, message in (
        ("linear", {"factor": 2, "target_length": 512}, "both factor"),
        ("linear", {"factor": 2, "original_length": 32_000}, "conflicts"),
        ("longrope", {"short_factor": [1.0] * 3, "long_factor": [1.0] * 3}, "short_factor has 3 entries"),
    ):
        with pytest.raises(hfpos.PatchError, match=message):
            hfpos.patch(model, scheme, **parameters)
        assert hfpos.describe(model).scheme == "yarn"
        assert torch.equal(logits(model, 100), before)
    assert torch.equal(logits(hfpos.unpatch(model)), logits(unpatched("llama")))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", *OWN_ATTENTION])
@pytest.mark.parametrize(
    ("scheme", "parameters"), [("yarn", {"factor": 4, "original_length": 32}), ("alibi", {"factor": 2})]
)
def test_error_in_the_middle_of_applying_changes_nothing(model_type, scheme, parameters, monkeypatch):
    applied, failing = [], 0

    def fail_once(edit, apply):
        applied.append(edit)
        if len(applied) == failing:
            raise OSError("no luck")
        apply(edit)

    for cls in {cls for edit in Edit.__args__ for cls in (edit, *edit.__subclasses__()) if "apply" in vars(cls)}:
        monkeypatch.setattr(cls, "apply", lambda edit, apply=cls.apply: fail_once(edit, apply))
    model = unpatched(model_type)
    before = State(model)
    hfpos.unpatch(hfpos.patch(model, scheme, **parameters))
    edits = len(applied)
    assert edits > 5
    for failing in range(1, edits + 1):
        applied.clear()
        with pytest.raises(OSError, match="no luck"):
            hfpos.patch(model, scheme, **parameters)
        assert len(applied) == failing
        assert State(model).differences(before) == []


# `patched`


def test_patched_restores_also_after_an_exception():
    model = unpatched("llama")
    before = State(model)
    with hfpos.patched(model, "yarn", factor=4) as inside:
        assert inside is model
        assert hfpos.describe(model).scheme == "yarn"
    assert State(model).differences(before) == []
    with pytest.raises(KeyError), hfpos.patched(model, hfpos.schemes.Linear(factor=2)):
        raise KeyError
    assert State(model).differences(before) == []


def test_patched_restores_the_patch_before():
    model = YARN.model()
    before = logits(model, 100)
    with hfpos.patched(model, "alibi"), hfpos.patched(model, "nope"):
        assert hfpos.describe(model).scheme == "nope"
    assert hfpos.describe(model).scheme == "yarn"
    with pytest.raises(hfpos.PatchError), hfpos.patched(model, "yarm", factor=4):
        pass
    assert hfpos.describe(model).scheme == "yarn"
    assert torch.equal(logits(model, 100), before)
    assert torch.equal(logits(hfpos.unpatch(model)), logits(unpatched("llama")))


def test_patched_restores_whatever_happens_inside():
    model = unpatched("llama")
    before = State(model)
    with hfpos.patched(model, "yarn", factor=4):
        hfpos.patch(model, "alibi")
    assert State(model).differences(before) == []
    with hfpos.patched(model, "yarn", factor=4):
        hfpos.unpatch(model)
    assert State(model).differences(before) == []


# Copies


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("copier", COPIERS.values(), ids=COPIERS)
@pytest.mark.parametrize("pair", FEW, ids=str)
def test_copy_of_a_patched_model(pair, copier):
    model = pair.model()
    before = State(model)
    twin = copier(model)
    assert torch.equal(logits(twin, 100), logits(model, 100))
    assert type(twin.config) is type(model.config)
    assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}
    hfpos.unpatch(twin)
    stock = pair.unpatched()
    assert torch.equal(logits(twin), logits(stock))
    assert twin.config.to_dict() == stock.config.to_dict()
    assert type(twin.config) is type(stock.config)
    assert State(model).differences(before) == []
    assert torch.equal(logits(hfpos.unpatch(model)), logits(stock))


def test_copy_made_before_patching_is_another_model():
    model = unpatched("llama")
    twin = copy.deepcopy(model)
    before = State(twin)
    hfpos.patch(model, "yarn", factor=4)
    assert State(twin).differences(before) == []


# The proof


class DeafRotary(LlamaRotaryEmbedding):
    """A rotary module that does not look at its frequencies."""

    def forward(self, x, position_ids):
        ones = torch.ones(*position_ids.shape, x.shape[-1] // 4, dtype=x.dtype)
        return ones, 0 * ones


def test_patch_that_does_nothing_is_refused():
    model = unpatched("llama")
    model.model.rotary_emb = DeafRotary(model.config)
    before = State(model)
    with pytest.raises(hfpos.PatchError, match=r"did not change the logits of LlamaForCausalLM.*prove=False"):
        hfpos.patch(model, "yarn", factor=4)
    assert State(model).differences(before) == []
    hfpos.patch(model, "yarn", factor=4, prove=False)
    assert not hfpos.describe(model).proved


def test_patch_that_does_nothing_keeps_the_one_before():
    model = unpatched("llama")
    model.model.rotary_emb = DeafRotary(model.config)
    hfpos.patch(model, "linear", factor=4, prove=False)
    before = State(model)
    with pytest.raises(hfpos.PatchError, match="did not change"):
        hfpos.patch(model, "yarn", factor=4)
    assert hfpos.describe(model).scheme == "linear"
    assert torch.equal(logits(model), before.logits)


class Overflowing(hfpos.schemes.Sinusoidal):
    """Sinusoids that are too large for any number."""

    def table(self, positions, width):
        return super().table(positions, width) * float("inf")


def test_patch_that_gives_no_finite_logits_is_refused():
    model = unpatched("llama")
    before = State(model)
    with pytest.raises(hfpos.PatchError, match=r"not finite on LlamaForCausalLM.*left as it was"):
        hfpos.patch(model, Overflowing())
    assert State(model).differences(before) == []


@pytest.mark.parametrize("scheme", ["linear", "ntk", "ntk_by_parts", "yarn", "llama3"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_neox"])
def test_factor_one_is_the_identity_and_no_error(model_type, scheme):
    model = Pair(model_type, scheme, {"factor": 1}).model()
    assert not hfpos.describe(model).proved
    torch.testing.assert_close(logits(model, 60), logits(unpatched(model_type), 60), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "pair", [Pair("llama", "rope"), Pair("llama", "partial", {"fraction": 1}), Pair("bloom", "alibi")], ids=str
)
def test_other_identities(pair):
    model = pair.model()
    assert not hfpos.describe(model).proved
    torch.testing.assert_close(logits(model), logits(pair.unpatched()), rtol=0, atol=1e-5)


def test_proof_leaves_no_trace():
    model = unpatched("llama").train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    generator = torch.get_rng_state()
    hfpos.patch(model, "yarn", factor=4)
    assert hfpos.describe(model).proved
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stock_dynamic_keeps_what_it_remembers():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model, twin = (unpatched("llama", rope_parameters=rope) for _ in range(2))
    for each in (model, twin):
        logits(each, 100)
    hfpos.unpatch(hfpos.patch(model, "yarn", factor=4))
    assert torch.equal(logits(model, 50), logits(twin, 50))  # the frequencies of the longer call, as stock has it


# What may be handed in


def test_compiled_model_is_refused():
    first, second = unpatched("llama"), unpatched("llama")
    compiled = torch.compile(first)
    second.compile()
    for model, handed_in in ((first, compiled), (second, second)):
        before = structure(model)
        with pytest.raises(hfpos.PatchError, match=r"is compiled.*patch first, then torch\.compile"):
            hfpos.patch(handed_in, "yarn", factor=4)
        assert structure(model) == before


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def test_wrapper_of_ones_own():
    wrapper = Wrapper(unpatched("llama"))
    assert hfpos.patch(wrapper, "yarn", factor=4) is wrapper
    assert torch.equal(logits(wrapper.inner, 100), logits(YARN.model(), 100))
    assert hfpos.describe(wrapper).scheme == "yarn"
    assert hfpos.unpatch(wrapper) is wrapper
    assert torch.equal(logits(wrapper.inner), logits(unpatched("llama")))


@pytest.mark.parametrize("pair", FEW, ids=str)
def test_decoder_without_a_head(pair):
    full, bare = pair.model(), pair.unpatched().base_model
    before = structure(bare, generation=False)
    hfpos.patch(bare, pair.scheme, **pair.parameters)
    with torch.no_grad():
        hidden = [decoder(tokens(2, 100)).last_hidden_state for decoder in (bare, full.base_model)]
    assert torch.equal(*hidden)
    assert structure(hfpos.unpatch(bare), generation=False) == before


def test_scheme_object():
    model = hfpos.patch(unpatched("llama"), hfpos.schemes.Yarn(factor=4))
    assert torch.equal(logits(model, 100), logits(YARN.model(), 100))


def test_plan_says_what_changes():
    plan = str(YARN.model().hfpos_record.plan)
    assert "LlamaModel.rotary_emb: LlamaRotaryEmbedding -> FixedRotary" in plan
    assert "LlamaForCausalLM.config: LlamaConfig -> LlamaConfig" in plan


def test_the_proof_is_not_misled_by_a_small_vocabulary():
    words = {"vocab_size": 7, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    assert hfpos.describe(hfpos.patch(unpatched("llama", **words).double(), "xpos")).proved
