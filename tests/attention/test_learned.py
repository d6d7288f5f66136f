"""Learned weights of a bias: where they are, that they stay float32, learn, and survive copies, checkpoints, adapters and unpatching."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import hfpos
from hfpos.attention.learned import LEARNED, LearnedBias
from tests.pairs import Pair, difference, tokens, trained, unpatched
from tests.state import State, logits


# PEFT 0.21 asks Transformers 5.23 for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SHAPES = {  # of tiny models: 2 layers, 4 heads of 16
    "kerple": {"raw_r1": (1, 4), "raw_r2": (1, 4)},
    "t5": {"table": (1, 32, 4)},
    "shaw": {"table": (2, 33, 16)},
    "fire": {
        "c": (2, 1), "multiplier": (2, 1), "hidden_weight": (2, 32, 1), "hidden_bias": (2, 32),
        "output_weight": (2, 4, 32), "output_bias": (2, 4),
    },
}  # fmt: skip
MODELS = ["llama", "gpt2", "bloom"]
each = pytest.mark.parametrize("scheme", SHAPES)
LENGTH = 50


def learned(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The learned weights by their own names."""
    return {name.split(".")[-1]: weight for name, weight in model.named_parameters() if f"{LEARNED}." in name}


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in learned(model).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("model_type", MODELS)
@each
def test_names_and_shapes(model_type: str, scheme: str) -> None:
    model = hfpos.patch(unpatched(model_type), scheme)
    prefix = f"{model.base_model_prefix}.{LEARNED}."
    found = {name.removeprefix(prefix): tuple(w.shape) for name, w in model.named_parameters() if LEARNED in name}
    assert found == SHAPES[scheme]
    assert set(found) <= {key.removeprefix(prefix) for key in model.state_dict()}
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in learned(model).values())
    hfpos.unpatch(model)
    assert not [key for key in model.state_dict() if LEARNED in key]


@each
def test_narrow_types_do_not_reach_them_and_wide_ones_do(scheme: str) -> None:
    model = Pair("llama", scheme).model()
    before = values(model)
    for cast in (model.bfloat16, model.half, lambda: model.to(torch.bfloat16), lambda: model.to("cpu", torch.float16)):
        cast()
        assert equal(values(model), before)
    assert model.dtype == torch.float16
    assert {weight.dtype for weight in learned(model.double()).values()} == {torch.float64}
    assert equal(values(model.float()), before)
    narrow = Pair("llama", scheme).unpatched().bfloat16()
    assert {weight.dtype for weight in learned(hfpos.patch(narrow, scheme)).values()} == {torch.float32}


def test_gradients_keep_their_type_too() -> None:
    model = Pair("llama", "kerple").model()
    model(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
    model.bfloat16()
    assert {weight.grad.dtype for weight in learned(model).values()} == {torch.float32}


@each
def test_on_meta_and_back(scheme: str) -> None:
    state = Pair("llama", scheme).model().state_dict()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(unpatched("llama").config)
    hfpos.patch(model.bfloat16(), scheme)
    assert all(weight.is_meta and weight.dtype == torch.float32 for weight in learned(model).values())
    model = model.float().to_empty(device="cpu")
    assert model.load_state_dict(state) == ([], [])
    model.tie_weights()
    assert equal(values(model), values(Pair("llama", scheme).model()))


@pytest.mark.parametrize("model_type", MODELS)
@each
def test_training_moves_all_of_them_and_lowers_the_loss(model_type: str, scheme: str) -> None:
    model = Pair(model_type, scheme).model().train().requires_grad_(False)
    for weight in learned(model).values():
        weight.requires_grad_()
    optimizer = torch.optim.Adam(learned(model).values(), lr=0.05)
    before, losses = values(model), []
    ids = tokens(2, 24).repeat(1, 2)
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model(ids, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, weight in learned(model).items():
        assert weight.grad.isfinite().all()
        assert not torch.equal(weight, before[name]), name
        if len(weight) > 1:  # layers differ
            assert not torch.equal(weight.grad[0], weight.grad[1])


def gradients(model: torch.nn.Module, call=None) -> dict[str, torch.Tensor]:
    ids = tokens(2, LENGTH)
    call = model if call is None else call
    cross_entropy(call(input_ids=ids, use_cache=False).logits.flatten(0, 1), ids.flatten()).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


CHECKPOINTED = [Pair("llama", scheme) for scheme in SHAPES] + [Pair("bloom", "kerple"), Pair("gpt2", "shaw")]
WAYS = [(pair, how) for pair in CHECKPOINTED for how in ("reentrant", "not reentrant")]
WAYS += [(Pair(*names), "compiled") for names in (("llama", "fire"), ("bloom", "kerple"))]


@pytest.mark.parametrize(("pair", "how"), WAYS, ids=str)
def test_gradients_do_not_depend_on_how_they_are_computed(pair: Pair, how: str) -> None:
    expected, model, call = gradients(pair.model().train()), pair.model().train(), None
    if how == "compiled":
        torch._dynamo.reset()
        call = torch.compile(model, backend="aot_eager", fullgraph=True)
    else:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    found = gradients(model, call)
    assert found.keys() == expected.keys()
    assert any(LEARNED in name for name in found)
    for name, gradient in found.items():
        assert difference(gradient, expected[name]) < 2e-5 * max(expected[name].abs().max().item(), 1), name


@each
def test_copies_have_their_own(scheme: str) -> None:
    model = Pair("llama", scheme).model()
    expected, before = logits(model, LENGTH), values(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, LENGTH), expected)
        trained(other, seed=1)
        assert equal(values(model), before)
        assert difference(logits(other, LENGTH), expected) > 1e-3
        assert torch.equal(logits(model, LENGTH), expected)


@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize(
    "pair", [Pair("llama", scheme) for scheme in SHAPES] + [Pair("bloom", "fire"), Pair("gpt2", "kerple")], ids=str
)
def test_checkpoints(pair: Pair, shards: str | None, tmp_path) -> None:
    model = pair.model()
    model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(shards)
    again = hfpos.from_pretrained(tmp_path)
    assert equal(values(again), values(model))
    assert difference(logits(again, LENGTH), logits(model, LENGTH)) < 1e-5
    narrow = hfpos.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert equal(values(narrow), values(model))
    again.save_pretrained(tmp_path / "second")
    assert equal(values(hfpos.from_pretrained(tmp_path / "second")), values(model))


def test_a_narrow_model_is_saved_with_wide_ones(tmp_path) -> None:
    model = Pair("llama", "fire").model()
    before = values(model)
    model.bfloat16().save_pretrained(tmp_path)
    assert equal(values(hfpos.from_pretrained(tmp_path)), before)
    assert hfpos.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_the_decoder_alone_is_saved_and_loaded(tmp_path) -> None:
    model = Pair("llama", "kerple").model()
    model.model.save_pretrained(tmp_path)
    again = hfpos.from_pretrained(tmp_path)
    assert equal(values(again), values(model))


def edit(folder, change) -> None:
    """Rewrite the one safetensors file of a folder."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_incomplete_checkpoints_are_refused(tmp_path) -> None:
    Pair("llama", "fire").model().save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.hfpos_bias.c": torch.ones(3, 1)}))
    with pytest.raises(
        hfpos.PatchError, match=r"another shape \(\(3, 1\)\) for the learned weights model.hfpos_bias.c \(2, 1\)"
    ):
        hfpos.from_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop("model.hfpos_bias.c"))
    with pytest.raises(hfpos.PatchError, match=r"lacks the learned weights model.hfpos_bias.c \(2, 1\)"):
        hfpos.from_pretrained(tmp_path)


def test_nothing_is_reported_missing_or_unexpected(tmp_path, caplog) -> None:
    Pair("llama", "fire").model().save_pretrained(tmp_path)
    hfpos.from_pretrained(tmp_path)
    assert LEARNED not in caplog.text


# Taking the scheme out, and putting it in again


@each
def test_unpatch_removes_them_and_patch_starts_anew(scheme: str) -> None:
    model = unpatched("llama")
    before = State(model)
    trained(hfpos.patch(model, scheme))
    assert hfpos.unpatch(model) is model
    assert State(model).differences(before) == []
    hfpos.patch(model, scheme)
    assert equal(values(model), values(hfpos.patch(unpatched("llama"), scheme)))
    hfpos.patch(model, "alibi")
    assert not learned(model)


@pytest.mark.parametrize("inner", ["kerple", "fire", "alibi", "yarn"])
@pytest.mark.parametrize("outer", ["kerple", "t5"])
def test_a_patch_for_the_time_being_gives_trained_ones_back(outer: str, inner: str) -> None:
    model = Pair("llama", outer).model()
    expected, before = logits(model, LENGTH), values(model)
    identities = {name: id(weight) for name, weight in learned(model).items()}
    with hfpos.patched(model, inner, **({"factor": 2} if inner == "yarn" else {})):
        assert not equal(values(model), before)
        trained(model, seed=2)
    assert equal(values(model), before)
    assert {name: id(weight) for name, weight in learned(model).items()} == identities  # which an optimizer holds
    assert torch.equal(logits(model, LENGTH), expected)


def test_a_failed_patch_keeps_trained_ones() -> None:
    model = Pair("llama", "kerple").model()
    before = values(model)
    with pytest.raises(hfpos.PatchError):
        hfpos.patch(model, "t5", max_distance=1)
    with pytest.raises(hfpos.PatchError):
        hfpos.patch(model, "kerple", r1=[1.0])
    assert equal(values(model), before)


# PEFT


def with_adapter(model: torch.nn.Module, **options) -> torch.nn.Module:
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options))


@pytest.mark.parametrize("scheme", ["kerple", "fire"])
def test_an_adapter_that_is_to_save_them_does(scheme: str, tmp_path) -> None:
    unpatched("llama").save_pretrained(tmp_path / "base")
    model = with_adapter(hfpos.patch(hfpos.from_pretrained(tmp_path / "base"), scheme), modules_to_save=[LEARNED])
    model.train()
    start = {name: w.detach().clone() for name, w in model.named_parameters() if LEARNED in name and w.requires_grad}
    assert len(start) == len(SHAPES[scheme])
    optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], lr=0.1)
    model(tokens(2, LENGTH), labels=tokens(2, LENGTH)).loss.backward()
    optimizer.step()
    assert all(not torch.equal(dict(model.named_parameters())[name], weight) for name, weight in start.items())
    model.eval()
    expected = logits(model, LENGTH)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["hfpos"]["scheme"] == scheme
    again = hfpos.from_pretrained(tmp_path / "adapter").eval()
    kept = [{name: w for name, w in m.named_parameters() if LEARNED in name} for m in (again, model)]
    assert equal(*kept)
    assert difference(logits(again, LENGTH), expected) < 1e-5  # sums may round by where in memory weights lie
    for found in (again, model):
        merged = found.merge_and_unload()
        assert difference(logits(merged, LENGTH), expected) < 1e-5
        assert {tuple(w.shape) for w in learned(merged).values()} == set(SHAPES[scheme].values())
        merged.save_pretrained(tmp_path / "merged")
        loaded = hfpos.from_pretrained(tmp_path / "merged")
        assert equal(values(loaded), values(merged))
        assert difference(logits(loaded, LENGTH), expected) < 1e-5


def test_an_adapter_that_would_lose_them_is_not_saved(tmp_path) -> None:
    unpatched("llama").save_pretrained(tmp_path / "base")
    model = hfpos.patch(with_adapter(hfpos.from_pretrained(tmp_path / "base")), "kerple")  # after wrapping: trainable
    assert all(weight.requires_grad for weight in learned(model).values())
    with pytest.raises(
        hfpos.PatchError, match=r"would not hold them; .*modules_to_save=\['hfpos_bias'\].*requires_grad_\(False\)"
    ):
        model.save_pretrained(tmp_path / "adapter")
    for weight in learned(model).values():
        weight.requires_grad_(False)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(
        logits(hfpos.from_pretrained(tmp_path / "adapter").eval(), LENGTH), logits(model.eval(), LENGTH)
    )


def test_an_adapter_on_a_trained_base_takes_it_from_there(tmp_path) -> None:
    Pair("llama", "kerple").model().save_pretrained(tmp_path / "base")
    model = with_adapter(hfpos.from_pretrained(tmp_path / "base")).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(hfpos.from_pretrained(tmp_path / "adapter").eval(), LENGTH), logits(model, LENGTH))


# Trainer


def test_trainer_neither_decays_nor_forgets_them(tmp_path) -> None:
    model = Pair("llama", "kerple").model()
    before = values(model)
    data = [{"input_ids": row, "labels": row} for row in tokens(4, 16)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=0.05, weight_decay=0.5, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    assert not [name for name in trainer.get_decay_parameter_names(model) if LEARNED in name]
    assert trainer.get_decay_parameter_names(model)
    trainer.train()
    assert not equal(values(model), before)
    again = hfpos.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(logits(again, LENGTH), logits(model.eval(), LENGTH))


def test_layers_take_their_own_row() -> None:
    start = {"a": torch.arange(3.0).double()}
    assert LearnedBias(start, layers=2)()["a"].shape == (2, 3)
    assert LearnedBias(start, layers=2, shared=True)()["a"].shape == (1, 3)
    model = Pair("llama", "shaw").model()
    expected = logits(model, LENGTH)
    with torch.no_grad():
        learned(model)["table"][1, :10] += 1.0
    hidden = [m(tokens(1, 9), output_hidden_states=True).hidden_states for m in (model, Pair("llama", "shaw").model())]
    assert torch.equal(hidden[0][1], hidden[1][1])  # behind the first layer
    assert not torch.equal(hidden[0][2], hidden[1][2])
    assert difference(logits(model, LENGTH), expected) > 1e-3
