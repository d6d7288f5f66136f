"""PEFT: wrapped before or after patching, trained, merged, saved as an adapter and put on a base again."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

import hfpos
from tests.pairs import Pair, tokens, unpatched
from tests.state import logits, numbers


# PEFT 0.21 asks Transformers 5.23 for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

FACTOR = {"factor": 4}
TARGETS = {
    "llama": ["q_proj", "k_proj"],
    "gpt2": ["c_attn"],
    "bloom": ["query_key_value"],
    "falcon": ["query_key_value"],
    "mpt": ["Wqkv"],
}
PAIRS = [
    Pair("llama", "yarn", FACTOR),
    Pair("llama", "dynamic", FACTOR),
    Pair("llama", "alibi"),
    Pair("gpt2", "yarn", FACTOR),
    Pair("gpt2", "nope"),
    Pair("gpt2", "learned", {"target_length": 128}),
    Pair("bloom", "rope"),
    Pair("bloom", "alibi", FACTOR),
    Pair("falcon", "alibi", FACTOR),
    Pair("mpt", "alibi", FACTOR),
]


def wrapped(model, model_type):
    """A LoRA with random weights, so that it changes the output, around the model."""
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, target_modules=TARGETS[model_type], init_lora_weights=False, fan_in_fan_out=model_type == "gpt2"
    )
    return get_peft_model(model, config).eval()


def adapter_weights(model):
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


def merged_by_hand(model, pair):
    """The patched model whose weights are those of the base with the adapter added to them, without PEFT."""
    state = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), (torch.nn.Linear, Conv1D)):
            state[name.removeprefix("base_model.model.")] = module.get_delta_weight("default")
    plain = pair.unpatched()
    with torch.no_grad():
        for name, delta in state.items():
            plain.get_submodule(name).weight += delta
    return hfpos.patch(plain, pair.scheme, **pair.parameters)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_order_of_wrapping_and_patching(pair):
    before = wrapped(pair.model(), pair.model_type)
    after = wrapped(pair.unpatched(), pair.model_type)
    assert hfpos.patch(after, pair.scheme, **pair.parameters) is after
    expected = logits(merged_by_hand(before, pair), 60)
    for model in (before, after):
        assert hfpos.describe(model).scheme == pair.scheme
        # the adapter's part is rotated and biased like the base's
        torch.testing.assert_close(logits(model, 60), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(model, 60), logits(pair.model(), 60), atol=1e-2)
    assert torch.equal(logits(before, 60), logits(after, 60))


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_unpatched_under_peft(pair):
    stock = logits(wrapped(pair.unpatched(), pair.model_type))
    for model in (wrapped(pair.model(), pair.model_type), wrapped(pair.unpatched(), pair.model_type)):
        if not hfpos.describe(model).patched:
            before = numbers(model)
            hfpos.patch(model, pair.scheme, **pair.parameters)
        else:
            before = None
        hfpos.unpatch(model)
        assert torch.equal(logits(model), stock)
        if before is not None:
            assert {name: (value.equal(before[name])) for name, value in numbers(model).items()} == dict.fromkeys(
                before, True
            )


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_gradients_reach_the_adapter_and_training_lowers_the_loss(pair):
    model = wrapped(pair.model(), pair.model_type).train()
    ids = tokens(2, 60)
    optimizer = torch.optim.AdamW(adapter_weights(model).values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(
            weight.grad is not None and weight.grad.abs().sum() > 0 for weight in adapter_weights(model).values()
        )
        assert all(weight.grad is None for name, weight in model.named_parameters() if "lora_" not in name)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_merged(pair, tmp_path):
    model = wrapped(pair.model(), pair.model_type)
    expected = logits(model, 60)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, 60), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    again = hfpos.from_pretrained(tmp_path)
    assert torch.equal(logits(again, 60), logits(merged, 60))
    if pair.scheme != "learned":
        assert hfpos.describe(again).scheme == pair.scheme
    hfpos.unpatch(merged)
    assert not hfpos.describe(merged).patched


# Folders that hold an adapter and nothing else


@pytest.fixture
def folders(tmp_path):
    """Where the base and the adapter go."""
    return tmp_path / "base", tmp_path / "adapter"


def save_adapter(pair, folders, *, first):
    """A base on disk, unpatched, and an adapter that was trained under the scheme; its logits."""
    base, adapter = folders
    pair.unpatched().save_pretrained(base)
    model = hfpos.from_pretrained(base)
    if first == "patch":
        hfpos.patch(model, pair.scheme, **pair.parameters)
    model = wrapped(model, pair.model_type)
    if first == "wrap":
        hfpos.patch(model, pair.scheme, **pair.parameters)
    model.save_pretrained(adapter)
    return logits(model, 60)


@pytest.mark.parametrize("first", ["patch", "wrap"])
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.scheme != "learned"], ids=str)
def test_adapter_brings_its_scheme_to_its_base(pair, first, folders):
    expected = save_adapter(pair, folders, first=first)
    block = json.loads((folders[1] / "adapter_config.json").read_text())["hfpos"]
    assert (block["scheme"], block["version"]) == (pair.scheme, hfpos.__version__)
    model = hfpos.from_pretrained(folders[1])
    assert isinstance(model, PeftModel)
    assert hfpos.describe(model).scheme == pair.scheme
    assert torch.equal(logits(model, 60), expected)
    for base_model in (folders[0], str(folders[0]), pair.unpatched(), pair.model()):
        model = hfpos.from_pretrained(folders[1], base_model=base_model)
        assert torch.equal(logits(model, 60), expected)


def test_adapter_on_a_saved_patched_base(folders):
    pair = PAIRS[1]
    model = pair.model()
    model.save_pretrained(folders[0])
    model = wrapped(hfpos.from_pretrained(folders[0]), "llama")
    model.save_pretrained(folders[1])
    assert torch.equal(logits(hfpos.from_pretrained(folders[1]), 60), logits(model, 60))


def test_adapter_and_base_of_different_schemes(folders):
    save_adapter(PAIRS[0], folders, first="patch")
    base = Pair("llama", "linear", FACTOR).model()
    before = logits(base, 60)
    message = r"was trained under yarn\(factor=4\), its base model has linear\(factor=4\); unpatch the base, or train"
    with pytest.raises(hfpos.PatchError, match=message):
        hfpos.from_pretrained(folders[1], base_model=base)
    assert torch.equal(logits(base, 60), before)
    with pytest.raises(hfpos.PatchError, match=r"its base model has yarn\(factor=8\)"):
        hfpos.from_pretrained(folders[1], base_model=Pair("llama", "yarn", {"factor": 8}).model())


def test_adapter_trained_without_a_scheme(folders):
    unpatched("llama").save_pretrained(folders[0])
    model = wrapped(hfpos.from_pretrained(folders[0]), "llama")
    model.save_pretrained(folders[1])
    assert "hfpos" not in json.loads((folders[1] / "adapter_config.json").read_text())
    again = hfpos.from_pretrained(folders[1])
    assert not hfpos.describe(again).patched
    assert torch.equal(logits(again), logits(model))


def test_adapter_saved_after_the_scheme_was_taken_out_again(folders):
    unpatched("llama").save_pretrained(folders[0])
    model = wrapped(hfpos.patch(hfpos.from_pretrained(folders[0]), "yarn", **FACTOR), "llama")
    model.save_pretrained(folders[1])
    hfpos.unpatch(model).save_pretrained(folders[1])
    assert "hfpos" not in json.loads((folders[1] / "adapter_config.json").read_text())
    hfpos.patch(model, "linear", factor=2).save_pretrained(folders[1])
    assert json.loads((folders[1] / "adapter_config.json").read_text())["hfpos"]["scheme"] == "linear"


def test_adapter_without_its_base(folders):
    save_adapter(PAIRS[0], folders, first="patch")
    path = folders[1] / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"base_model_name_or_path": str(folders[0] / "moved")}))
    with pytest.raises(hfpos.PatchError, match="moved is not a folder"):
        hfpos.from_pretrained(folders[1])
    path.write_text(json.dumps(values | {"base_model_name_or_path": None}))
    with pytest.raises(hfpos.PatchError, match="does not say which model it belongs to; pass base_model="):
        hfpos.from_pretrained(folders[1])
    with pytest.raises(hfpos.PatchError, match=r"base_model= was given, but .* holds no adapter_config\.json"):
        hfpos.from_pretrained(folders[0], base_model=folders[0])


def test_adapter_also_loads_with_peft_alone(folders):
    expected = save_adapter(PAIRS[0], folders, first="patch")
    model = PeftModel.from_pretrained(PAIRS[0].model(), folders[1])
    assert torch.equal(logits(model, 60), expected)
