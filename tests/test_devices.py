"""Dtypes, the meta device and accelerate: where a model's tensors go, its positions stay what they are."""

import time

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.hooks import remove_hook_from_submodules

import hfpos
from tests.pairs import OWN_ATTENTION, PAIRS, Pair, unpatched
from tests.state import logits


FACTOR = {"factor": 4}
FEW = [
    Pair("llama", "yarn", FACTOR),
    Pair("gpt_neox", "yarn", FACTOR),
    Pair("llama", "dynamic", FACTOR),
    Pair("llama", "alibi"),
    Pair("llama", "sinusoidal"),
    Pair("gpt2", "yarn", FACTOR),
    Pair("gpt2", "nope"),
    Pair("bloom", "rope"),
    Pair("bloom", "alibi", FACTOR),
    Pair("falcon", "alibi", FACTOR),
    Pair("mpt", "alibi", FACTOR),
]
LEARNED = Pair("gpt2", "learned", {"target_length": 600})
LONGROPE = {"short_factor": [1.1] * 8, "long_factor": [3.3] * 8, "cache": "pinned"} | FACTOR


def cast_parameters(model, dtype):
    """Every weight in `dtype`, and the rotary frequencies, which `model.to` would round, as they were."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


# Dtypes


def cos_sin_at(model, positions):
    """What the rotary module of the model gives in float32."""
    rotary = model.base_model.rotary_emb
    layer = {"layer_type": "full_attention"} if hasattr(rotary, "layer_types") else {}
    return torch.stack(rotary(torch.zeros(1, 1, 1), torch.tensor([positions]), **layer))


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "half, then float": lambda model: model.half().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "gpt_neox"])
def test_frequencies_stay_float32(model_type, cast):
    for scheme, parameters in (("yarn", FACTOR), ("partial", {}), ("dynamic", FACTOR | {"cache": "pinned"})):
        model = Pair(model_type, scheme, parameters).model()
        positions = [0, 1, 4095, 32_767, 131_071]
        before = cos_sin_at(model, positions)
        cast(model)
        buffers = dict(model.base_model.rotary_emb.named_buffers())
        assert {buffer.dtype for name, buffer in buffers.items() if "inv_freq" in name} == {torch.float32}
        torch.testing.assert_close(cos_sin_at(model, positions), before, rtol=0, atol=1e-6)


def test_stock_frequencies_do_not():
    """The trap itself: if this fails Transformers has changed, and the tests around it show less than they did."""
    model = unpatched("llama")
    before = cos_sin_at(model, [131_071])
    assert (cos_sin_at(model.bfloat16(), [131_071]) - before).abs().max() > 0.5


def test_cast_before_patching():
    model = hfpos.patch(unpatched("llama").bfloat16(), "yarn", **FACTOR)
    expected = Pair("llama", "yarn", FACTOR).model()
    assert torch.equal(cos_sin_at(model, [131_071]), cos_sin_at(expected, [131_071]))
    hfpos.unpatch(model)
    stock = unpatched("llama").bfloat16()
    assert torch.equal(logits(model), logits(stock))
    assert torch.equal(model.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "pair", [pair for pair in PAIRS if pair.model_type in ("llama", "gpt2", *OWN_ATTENTION)], ids=str
)
def test_cast_after_patching(pair):
    model = pair.model()
    exact = logits(model, 60)
    rough = logits(model.bfloat16(), 60)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.04 * exact.norm()
    hfpos.unpatch(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), logits(cast_parameters(pair.unpatched(), torch.bfloat16)))


@pytest.mark.parametrize("pair", FEW, ids=str)
def test_double_and_half(pair):
    model = pair.model()
    exact = logits(model, 60)
    double = logits(model.double(), 60)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), exact, rtol=0, atol=1e-4)
    half = logits(model.half(), 60)
    assert half.dtype == torch.float16
    assert (half.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("constructor", ["arange", "tensor"])
@pytest.mark.parametrize(
    "pair",
    [*FEW, LEARNED, Pair("llama", "longrope", LONGROPE), Pair("llama", "llama3", FACTOR)],
    ids=str,
)
def test_constructors_that_return_bfloat16(pair, constructor, monkeypatch):
    """As inside DeepSpeed's `zero.Init`, which gives every new floating tensor the dtype of the model."""
    model, expected = pair.unpatched(), pair.model()
    original = getattr(torch, constructor)

    def rounded(*args, **kwargs):
        made = original(*args, **kwargs)
        return made.bfloat16() if made.is_floating_point() else made

    with monkeypatch.context() as context:
        context.setattr(torch, constructor, rounded)
        hfpos.patch(model, pair.scheme, prove=False, **pair.parameters)
    torch.testing.assert_close(logits(model, 60), logits(expected, 60), rtol=0, atol=1e-5)


# Meta


def on_meta(pair, context):
    """The model that `pair` patches, without weights."""
    model = pair.unpatched()
    with context:
        return type(model)(model.config).eval()


def filled(model, state, how):
    """The model with the weights `state`."""
    if how == "to_empty":
        model.to_empty(device="cpu")
        model.load_state_dict(state)
    else:
        model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


@pytest.mark.parametrize("how", ["to_empty", "assign"])
@pytest.mark.parametrize("pair", FEW, ids=str)
def test_patched_without_weights_and_filled_later(pair, how):
    expected = pair.model()
    for context in (torch.device("meta"), init_empty_weights(include_buffers=True), init_empty_weights()):
        model = on_meta(pair, context)
        hfpos.patch(model, pair.scheme, **pair.parameters)
        assert not hfpos.describe(model).proved
        filled(model, expected.state_dict(), how)
        assert torch.equal(logits(model, 60), logits(expected, 60))
        assert not [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]


@pytest.mark.parametrize("how", ["to_empty", "assign"])
@pytest.mark.parametrize("pair", FEW, ids=str)
def test_unpatched_after_it_was_filled(pair, how):
    stock = pair.unpatched()
    model = on_meta(pair, torch.device("meta"))
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hfpos.patch(model, pair.scheme, **pair.parameters)
    hfpos.unpatch(filled(model, stock.state_dict(), how))
    assert torch.equal(logits(model), logits(stock))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert not [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]


def test_table_without_weights_cannot_be_resized():
    model = on_meta(LEARNED, torch.device("meta"))
    with pytest.raises(hfpos.PatchError, match="the position table has no weights yet.*load them first"):
        hfpos.patch(model, "learned", target_length=96)


def test_large_model_is_patched_at_once():
    config = transformers.LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, max_position_embeddings=4096
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    for scheme, parameters in (("yarn", {"factor": 8}), ("alibi", {}), ("dynamic", {})):
        seconds = []
        for _ in range(3):  # of which the best, as the machine may be busy
            start = time.perf_counter()
            hfpos.patch(model, scheme, **parameters)
            seconds.append(time.perf_counter() - start)
            hfpos.unpatch(model)
        assert min(seconds) < 0.2


# accelerate


def by_device_map(model, folder):
    return dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def by_cpu_offload(model, folder):
    return cpu_offload(model, torch.device("cpu"))


def by_disk_offload(model, folder):
    return disk_offload(model, folder, torch.device("cpu"))


DISPATCHES = {"device_map": by_device_map, "cpu_offload": by_cpu_offload, "disk_offload": by_disk_offload}


@pytest.mark.parametrize("dispatch", DISPATCHES.values(), ids=DISPATCHES)
@pytest.mark.parametrize("pair", FEW, ids=str)
def test_patched_before_and_after_dispatch(pair, dispatch, tmp_path):
    expected = logits(pair.model(), 60)
    before = logits(pair.unpatched())
    first = dispatch(pair.model(), tmp_path / "first")
    assert torch.equal(logits(first, 60), expected)
    second = hfpos.patch(dispatch(pair.unpatched(), tmp_path / "second"), pair.scheme, **pair.parameters)
    assert torch.equal(logits(second, 60), expected)
    for model in (first, second):
        hfpos.unpatch(model)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("pair", FEW, ids=str)
def test_hooks_removed_while_patched(pair):
    model = hfpos.patch(by_device_map(pair.unpatched(), None), pair.scheme, **pair.parameters)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model, 60), logits(pair.model(), 60))
    hfpos.unpatch(model)
    assert torch.equal(logits(model), logits(pair.unpatched()))


# the files of a gpt_neox have other names for its weights, which only Transformers' own loader knows
@pytest.mark.parametrize("pair", [pair for pair in FEW if pair.model_type != "gpt_neox"], ids=str)
def test_checkpoint_dispatched_into_a_patched_skeleton(pair, tmp_path):
    pair.unpatched().save_pretrained(tmp_path)
    model = on_meta(pair, init_empty_weights())
    model.tie_weights()
    hfpos.patch(model, pair.scheme, **pair.parameters)
    model = load_checkpoint_and_dispatch(model, tmp_path, device_map={"": "cpu"}, force_hooks=True)
    assert torch.equal(logits(model, 60), logits(pair.model(), 60))
    hfpos.unpatch(model)
    assert torch.equal(logits(model), logits(pair.unpatched()))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_loaded_with_a_device_map(device_map, tmp_path):
    for number, pair in enumerate(FEW):
        pair.unpatched().save_pretrained(tmp_path / f"{number}")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}", device_map=device_map)
        hfpos.patch(model, pair.scheme, **pair.parameters)
        assert hfpos.describe(model).proved
        assert torch.equal(logits(model, 60), logits(pair.model(), 60))
