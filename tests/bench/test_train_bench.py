"""The training benchmark at tiny sizes: what it reports is there, and a wrong step or a lost model would show in it."""

import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

import hfpos
from hfpos.bench import train_gpu, train_step
from hfpos.bench.run import BENCHMARKS
from hfpos.bench.train_cases import CASES, Case, Text
from hfpos.bench.train_quality import RECIPES, extend
from hfpos.scheme import PatchError
from hfpos.train.recipe import Recipe


SMALL = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8
)
SHORT = ("training.max_steps=3", "training.per_device_train_batch_size=2")
LLAMA = Case(
    base="base-llama",
    base_changes=(
        "model.config.hidden_size=16",
        "model.config.max_position_embeddings=16",
        "model.tokenizer=260",
        "data.length=16",
        *SHORT,
    ),
    recipe="llama2-7b-pose-128k",
    changes=("data.length=32", "data.positions.target_length=64", "lora={r: 2, alpha: 4}", *SHORT),
    control=("scheme=none", "data.positions=null", "data.length=16"),
    schemes=("linear", "yarn"),
)
GPT2 = Case(
    base="base-gpt2",
    base_changes=(
        "model.config.n_embd=16",
        "model.config.n_positions=16",
        "model.tokenizer=260",
        "data.length=16",
        *SHORT,
    ),
    recipe="gpt2-rope-4k",
    changes=("data.length=64", *SHORT),
    control=("scheme=none", "data.length=16"),
)


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPOS_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three"]
    for name in ("train", "held_out"):
        rows = ({"text": " ".join(draw.choices(words, k=100))} for _ in range(8))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Text((f"data.sources={tmp_path}/train.jsonl",), str(tmp_path / "held_out.jsonl"), None, documents=4)


def test_the_benchmark_is_listed():
    assert "train" in BENCHMARKS


def test_a_step_of_ours_has_the_loss_of_a_plain_one_and_needs_less_memory():
    config = LlamaConfig(**{**SMALL.to_dict(), "vocab_size": 24_000})
    found = train_step.step(1024, lambda: train_gpu.seeded(config), rounds=1)
    assert found["loss_relative_difference"] < 1e-5
    assert found["loss_of_hfpos"].startswith("no logits are held")
    assert found["peak_memory_over_plain"] < 0.8
    assert found["tokens_a_second_over_plain"] > 0


def test_pose_reaches_sixteen_times_the_window():
    found = train_step.pose(window=16, batch=2, rounds=1, steps=2, model=lambda *sizes: train_gpu.seeded(SMALL))
    assert found["target"] == 256
    assert found["time_over_plain"] > 0


def test_the_clock_counts_every_step_and_each_round(tmp_path):
    trainers = {"one": _trainer(tmp_path, steps=3)}
    clocks = train_step.timed(trainers, rounds=2)
    assert len(clocks["one"].rounds) == 2
    assert len(clocks["one"]._ends) == 4
    assert trainers["one"].state.global_step == 3


def test_a_llama_is_measured_before_and_after_beside_a_control(tmp_path, text):
    found = extend("llama", LLAMA, tmp_path / "bench", text)
    assert (found["trained_length"], found["length"]) == (16, 64)
    assert list(found["perplexity"]) == ["unpatched", "linear", "yarn", "control", "recipe"]
    assert all(set(row) == {16, 64} for row in found["perplexity"].values())
    assert sorted(found["worst_to_best_before_fine_tuning"]) == ["linear", "unpatched", "yarn"]
    assert found["share_of_pretraining_tokens"] == 2.0  # three steps of 2 x 32 tokens after three of 2 x 16
    before, after = found["perplexity"]["unpatched"], found["perplexity"]["recipe"]
    assert found["short_context_cost"] == pytest.approx(after[16] / before[16] - 1, abs=1e-3)
    assert found["recipe_long_over_unpatched_short"] == pytest.approx(after[64] / before[16], abs=1e-3)
    json.dumps(found)


def test_a_base_model_is_trained_once_and_one_of_another_recipe_is_refused(tmp_path, text):
    bench = tmp_path / "bench"
    first = extend("llama", LLAMA, bench, text)
    written = (bench / "llama" / "model" / "model.safetensors").stat().st_mtime_ns
    assert extend("llama", LLAMA, bench, text)["perplexity"] == first["perplexity"]
    assert (bench / "llama" / "model" / "model.safetensors").stat().st_mtime_ns == written
    other = replace(LLAMA, base_changes=(*LLAMA.base_changes, "model.seed=1"))
    with pytest.raises(PatchError, match="finished run"):
        extend("llama", other, bench, text)


def test_a_learned_table_has_no_figure_beyond_its_length(tmp_path, text):
    found = extend("gpt2", GPT2, tmp_path, text)
    assert set(found["perplexity"]["unpatched"]) == set(found["perplexity"]["control"]) == {16}
    assert set(found["perplexity"]["recipe"]) == {16, 64}
    assert found["unpatched_long_over_short"] is None


@pytest.mark.parametrize("name", [*CASES, "gpu"])
def test_the_recipes_of_each_case_are_strictly_right(name):
    case = train_gpu.LLAMA if name == "gpu" else CASES[name]
    base = Recipe.load(RECIPES / f"{case.base}.yaml", case.base_changes)
    recipe = Recipe.load(RECIPES / f"{case.recipe}.yaml", case.changes)
    control = Recipe.load(RECIPES / f"{case.recipe}.yaml", (*case.changes, *case.control))
    assert control.scheme is None
    assert recipe.create_scheme() is not None
    assert control.data.length == base.data.length
    assert _tokens(control) == _tokens(recipe)
    if name == "llama":
        assert _tokens(recipe) <= 0.05 * _tokens(base)


def test_the_gpu_part_at_a_tiny_size(tmp_path, text):
    found = train_gpu.run(tmp_path, LLAMA, text, ("data.positions.target_length=64",), SMALL, tokens=32)
    assert found["4x"]["length"] == 64
    assert found["16x"]["length"] == 256
    assert found["4x"]["base"]["tokens_a_second"] > 0
    assert found["step"]["mfu"] is None or torch.cuda.is_available()
    assert hfpos.describe(hfpos.from_pretrained(str(tmp_path / "gpu-llama" / "model"))).trained_length == 16


def test_mfu_is_a_share_of_the_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    flops = train_gpu.flops_a_token(SMALL, 32)
    assert train_gpu.mfu(0.25 * 989e12 / flops, SMALL, 32) == pytest.approx(0.25)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "unheard of")
    assert train_gpu.mfu(1.0, SMALL, 32) is None


def _tokens(recipe):
    training = recipe.training
    return training["max_steps"] * training["per_device_train_batch_size"] * recipe.data.length


def _trainer(folder, steps):
    model = train_gpu.seeded(SMALL)
    arguments = train_step._arguments(folder, steps, batch=1)
    return train_step.LongContextTrainer(
        measure=None,
        model=model,
        args=arguments,
        train_dataset=train_step._rows(1, 16, 64),
        data_collator=train_step.Collator(),
    )
