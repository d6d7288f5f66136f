"""A training loss without logits: the model's own loss and gradients, on every family, wrapped, patched, copied and taken off again."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, Trainer, TrainingArguments

import hfpos
from hfpos import PatchError
from hfpos.data.collators import Collator, PoseCollator
from hfpos.train.head import chunk_the_loss
from tests.pairs import checkpointing
from tests.state import numbers, structure
from tests.tiny import tiny
from tests.train.allocations import allocations


pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's call
VOCABULARY, LENGTH = 128, 21
MODELS = {
    "llama": {},
    "llama untied": {"tie_word_embeddings": False},
    "llama tied": {"tie_word_embeddings": True},
    "gpt2": {},
    "bloom": {},
    "phi": {},  # a bias in the head
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 7.0},
    "hyperclovax": {"logits_scaling": 0.4},
    "nanochat": {"final_logit_softcapping": 3.0},
    "mixtral": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
}
PATCHES = {"llama": ("yarn", {"factor": 4}), "gpt2": ("rope", {}), "bloom": ("alibi", {"factor": 4})}


def model_of(name, **more):
    return tiny(name.split()[0], **MODELS[name] | more).train()


def batch(**more):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 100, (3, LENGTH), generator=generator)
    labels = ids.clone()
    labels[0, 3:9] = labels[1, -1] = labels[2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "use_cache": False} | more


def learn(model, **more):
    """Loss and gradients of one training step; dropout is the same in all."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(**batch(**more)).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    assert len(found) > 1
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * max(1, value.abs().max()), name


def assert_chunked_alike(model, tolerance=1e-5, **more):
    expected = learn(model, **more)
    installed = chunk_the_loss(model, chunk=5)
    assert installed.chunked, installed.reason
    assert model(**batch(**more)).logits.shape == (3, LENGTH, 1)
    assert_equal(learn(model, **more), expected, tolerance)
    return installed


@pytest.mark.parametrize("name", MODELS)
def test_families(name):
    installed = assert_chunked_alike(model_of(name))
    assert "no logits are held: linear cross entropy" in installed.reason


@pytest.mark.parametrize("name", PATCHES)
def test_patched_models_with_gradient_checkpointing(name):
    scheme, parameters = PATCHES[name]
    model = checkpointing(hfpos.patch(model_of(name), scheme, **parameters))
    jumps = {}
    if name == "llama":
        rows = [{"input_ids": row, "labels": row} for row in batch()["input_ids"]]
        jumps = {"position_ids": PoseCollator(64)(rows)["position_ids"]}
    assert_chunked_alike(model, **jumps)


@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": 57},
        {"num_items_in_batch": torch.tensor(57)},
        {"shift_labels": F.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].contiguous()},
        {"labels": batch()["input_ids"].flip(1), "shift_labels": batch()["input_ids"].flip(1)},  # DeepSpeed's Ulysses
    ],
)
def test_what_trainers_pass(more):
    assert_chunked_alike(model_of("llama"), **more)


def test_nothing_to_predict_is_zero():
    model = model_of("gpt2")
    chunk_the_loss(model)
    found = learn(model, labels=torch.full((3, LENGTH), -100))
    assert not any(value.any() for value in found.values())


def test_no_logits_at_4096_tokens_and_32k_words():
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).train()
    ids = torch.randint(32_000, (1, 4096))
    chunk_the_loss(model)
    with allocations() as made:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert max(made) < 4 * 4096 * 32_000 / 15  # 262 tokens at a time
    assert model.lm_head.weight.grad.any()
    assert model.model.embed_tokens.weight.grad.any()


@torch.no_grad()
def test_evaluation_and_generation_are_the_models_own():
    model = model_of("gemma2").eval()
    expected, prompt = model(**batch()), batch()["input_ids"][:, :5]
    generated = model.generate(prompt, max_new_tokens=5, do_sample=False)
    chunk_the_loss(model)
    found = model(**batch())
    assert found.logits.equal(expected.logits)
    assert found.loss.equal(expected.loss)
    assert model.generate(prompt, max_new_tokens=5, do_sample=False).equal(generated)
    model.train()
    for changes in ({"labels": None}, {}):  # and without gradients
        with torch.set_grad_enabled(bool(changes)):
            assert model(**batch(**changes)).logits.shape == (3, LENGTH, VOCABULARY)


def test_labels_of_the_last_tokens():
    model, given = model_of("llama"), {"logits_to_keep": 4, "labels": batch()["input_ids"][:, -4:]}
    expected = learn(model, **given)
    chunk_the_loss(model)
    assert_equal(learn(model, **given), expected)
    with pytest.raises(ValueError, match="batch_size"):  # as without
        model(**batch(logits_to_keep=4))


def test_removed_without_a_trace():
    for name in ("llama", "cohere"):
        model = model_of(name)
        model.model.layers[0].eval()
        before, values, rng, saved = structure(model), numbers(model), torch.get_rng_state(), model.state_dict().keys()
        state = dict(model.__dict__), dict(model.lm_head.__dict__)
        installed = chunk_the_loss(model)
        assert model.state_dict().keys() == saved
        assert all(p.grad is None for p in model.parameters())
        assert torch.get_rng_state().equal(rng)
        assert [m.training for m in model.modules()].count(False) == len(list(model.model.layers[0].modules()))
        installed.remove()
        installed.remove()
        assert structure(model) == before
        assert (model.__dict__, model.lm_head.__dict__) == state
        assert all(value.equal(values[key]) for key, value in numbers(model).items())
        chunk_the_loss(model).remove()


def test_copies_are_chunked_on_their_own(tmp_path):
    model = model_of("gemma2")
    expected = learn(model)
    installed = chunk_the_loss(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.model.norm.weight.mul_(1.5)
        assert twin(**batch()).logits.shape[-1] == 1
        assert not twin(**batch()).loss.allclose(expected["loss"], rtol=1e-3)
        assert_equal(learn(model), expected)
    model.save_pretrained(tmp_path)
    installed.remove()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").train()
    assert loaded(**batch()).logits.shape[-1] == VOCABULARY
    assert_equal(learn(loaded), expected)


def test_bfloat16_and_autocast():
    exact = learn(model_of("granite"))
    half = model_of("granite").bfloat16()
    assert chunk_the_loss(half).chunked
    assert_equal({n: value.float() for n, value in learn(half).items()}, exact, 0.03)
    mixed = model_of("granite")
    assert chunk_the_loss(mixed).chunked
    with torch.autocast("cpu", torch.bfloat16):
        found = learn(mixed)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_equal(found, exact, 0.03)


def lora(model, targets, **more):
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **more)
    return get_peft_model(model, config).train()


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_lora_holds_no_gradient_of_a_frozen_head(wrapped_first):
    models = [model_of("llama untied", vocab_size=4001) for _ in range(2)]
    wrapped = []
    for model, chunked in zip(models, (False, True), strict=True):
        installed = chunk_the_loss(model, chunk=5) if chunked and not wrapped_first else None
        torch.manual_seed(0)
        wrapped.append(lora(model, ["q_proj"]))
        installed = chunk_the_loss(wrapped[-1], chunk=5) if chunked and wrapped_first else installed
    assert installed.chunked, installed.reason
    with allocations() as made:
        found = learn(wrapped[1])
    assert all("lora" in name for name in found if name != "loss")
    assert models[1].lm_head.weight.nbytes not in made
    assert_equal(found, learn(wrapped[0]))


@pytest.mark.parametrize("more", [{}, {"lora_dropout": 0.3}])
def test_lora_on_the_head(more):
    torch.manual_seed(0)
    model = lora(model_of("cohere", tie_word_embeddings=False), ["q_proj", "lm_head"], **more)
    if not more:
        installed = assert_chunked_alike(model)
        assert "runs on chunks of tokens" in installed.reason
        installed.remove()
        assert "forward" not in model.get_output_embeddings().__dict__
    else:  # drawn chunk by chunk: other numbers than at once, but the same again in the backward
        assert chunk_the_loss(model, chunk=5).chunked
        found, again = learn(model), learn(model)
        assert_equal(found, again, 0)


def test_a_head_that_is_trained_beside_lora():
    torch.manual_seed(0)
    model = lora(model_of("llama untied"), ["q_proj"], modules_to_save=["lm_head"])
    installed = assert_chunked_alike(model)
    assert any("modules_to_save" in name for name in learn(model))
    with model.disable_adapter():  # the original head, which is not ours
        assert model(**batch()).logits.shape[-1] == VOCABULARY
    installed.remove()
    assert model(**batch()).logits.shape[-1] == VOCABULARY


def test_trainer_with_accumulation(tmp_path):
    rows = [row.tolist() for row in torch.randint(5, 100, (12, 16), generator=torch.Generator().manual_seed(0))]
    samples = [{"input_ids": row, "labels": [-100] * (i % 5) + row[i % 5 :]} for i, row in enumerate(rows)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    weights, losses = [], []
    for chunked in (False, True):
        model = tiny("gemma2")
        if chunked:
            assert chunk_the_loss(model, chunk=5).chunked
        trainer = Trainer(model, arguments, data_collator=Collator(), train_dataset=samples, eval_dataset=samples[:2])
        trainer.train()
        assert trainer.predict(samples[:2]).predictions.shape == (2, 16, VOCABULARY)
        weights.append(numbers(model))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(losses[0]) == 3
    assert_equal(weights[1], weights[0], 1e-3)  # Adam divides small gradients by their size


@pytest.mark.parametrize(
    ("name", "why"),
    [("xlnet", "does not call its loss function"), ("bart", "could not be followed"), ("git", "more to its logits")],
)
def test_models_with_a_loss_of_another_kind_stay_as_they_are(name, why):
    model = tiny(name)
    before = structure(model, generation=False)
    installed = chunk_the_loss(model)
    assert not installed.chunked
    assert why in installed.reason
    assert "\n" not in installed.reason
    assert structure(model, generation=False) == before
    installed.remove()


def test_what_the_comparison_is_for(monkeypatch):
    model = model_of("llama")
    monkeypatch.setattr("hfpos.train.head.bend_after", lambda *args: hfpos.train.head.Bend(scale=1.01))
    before = structure(model)
    assert "another loss" in chunk_the_loss(model).reason
    assert structure(model) == before


def test_a_loss_function_of_the_users_own():
    model = model_of("llama")
    model.loss_function = lambda *args, **kwargs: torch.zeros(())
    assert "loss function of its own" in chunk_the_loss(model).reason


def test_tensor_parallel_heads_stay_as_they_are():
    model = model_of("llama")
    model._tp_size = 2
    assert "tensor parallel" in chunk_the_loss(model).reason


def test_on_meta_scale_and_soft_cap_are_known():
    with torch.device("meta"):
        model = model_of("gemma2")
    installed = chunk_the_loss(model)
    assert installed.chunked
    assert model.lm_head.forward.__self__.bend.softcap == pytest.approx(2.0)


def test_wrong_use():
    model = model_of("llama")
    chunk_the_loss(model)
    with pytest.raises(PatchError, match="chunked already"):
        chunk_the_loss(model)
    with pytest.raises(PatchError, match="past its hooks"):
        model.forward(**batch())
    with pytest.raises(PatchError, match="ignores -100 only"):
        model(**batch(ignore_index=7))
    with pytest.raises(PatchError, match="no language modelling head"):
        chunk_the_loss(LlamaModel(tiny("llama").config))
