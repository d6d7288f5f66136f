"""`hfpos plan` reads configs only, agrees with the run's own numbers, and the accelerate configs are accelerate's."""

import re
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import LlamaConfig, LlamaForCausalLM

import hfpos
from hfpos.train.holdings import Layout
from hfpos.train.layouts import read_layout
from hfpos.train.planning import memory_settings, plan
from hfpos.train.recipe import Recipe
from tests.command_line import run


CONFIGS = sorted(Path("recipes/accelerate").glob("*.yaml"))
LAYOUTS = {
    "single": Layout(),
    "ddp": Layout(8, 8),
    "fsdp2": Layout(8, 8, 1, "all"),
    "multi-node": Layout(16, 16, 1, "all"),
    "fsdp2-context-parallel": Layout(8, 1, 8, "all"),
    "zero2": Layout(8, 8, 1, "gradients"),
    "zero3": Layout(8, 8, 1, "all"),
    "ulysses": Layout(8, 4, 2, "gradients"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config without weights."""
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    config.architectures = ["LlamaForCausalLM"]
    config.tie_word_embeddings = True
    config.save_pretrained(path)
    return path


def recipe(folder, **sections):
    values = {
        "model": {"path": str(folder)},
        "scheme": {"name": "yarn", "factor": 2},
        "data": {"sources": "b", "length": 1024},
        "training": {
            "output_dir": "o",
            "max_steps": 10,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
        },
    }
    return Recipe.parse(values | sections)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_accelerates_own(path):
    loaded = load_config_from_file(str(path))
    layout, mixed = read_layout(path)
    assert layout == LAYOUTS[path.stem]
    assert loaded.num_processes == layout.processes
    assert mixed == str(loaded.mixed_precision)


def test_every_engine_has_a_config_and_recipes_name_those_there_are():
    assert {path.stem for path in CONFIGS} == set(LAYOUTS)
    for path in Path("recipes").glob("**/*.yaml"):
        for named in re.findall(r"recipes/[\w./-]+\.(?:yaml|sbatch)", path.read_text(encoding="utf-8")):
            assert Path(named).exists(), f"{path} names {named}"


def test_numbers_and_parts(folder):
    found = plan(recipe(folder))
    assert found.parameters == LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).num_parameters()
    assert found.step_tokens == 2 * 3 * 1024
    assert found.total_tokens == 10 * found.step_tokens
    assert found.trained == found.parameters
    assert found.fits
    assert found.advice == ()
    shared = plan(recipe(folder), "recipes/accelerate/ulysses.yaml", processes=4)
    assert shared.step_tokens == 2 * found.step_tokens
    adapted = plan(recipe(folder, lora={"r": 2}))
    assert adapted.trained < adapted.parameters / 10
    assert adapted.memory.optimizer < found.memory.optimizer


def test_epochs_have_no_total_without_data(folder):
    training = {"output_dir": "o", "num_train_epochs": 2}
    assert plan(recipe(folder, training=training)).total_tokens is None
    assert memory_settings(recipe(folder, training=training))["batch_size"] == 8  # Transformers' default


def test_what_does_not_fit_is_advised(folder, tmp_path, capsys, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(folder).dump(), encoding="utf-8")
    assert run(monkeypatch, "plan", path, "--device-memory", "80") == 0
    assert "fits into 80.00 GiB" in capsys.readouterr().out
    assert run(monkeypatch, "plan", path, "training.per_device_train_batch_size=64", "--device-memory", "1.3") == 1
    said = capsys.readouterr().out
    assert "does not fit into 1.30 GiB" in said
    assert "training.gradient_checkpointing: true" in said


def test_a_new_model_needs_no_data(folder):
    model = {
        "config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
        "tokenizer": 300,
    }
    data = {"sources": "b", "length": 64}
    layer = 4 * 32 + (3 * 32 + 1 * 32 + 4 * 32) * (32 + 1) + 4 * 32 * 32 + 32
    found = plan(recipe(folder, model=model, scheme=None, data=data))
    assert found.parameters == 300 * 32 + 64 * 32 + layer + 2 * 32  # embeddings and head are one


def test_mistakes(folder, tmp_path):
    with pytest.raises(hfpos.PatchError, match="cannot be divided"):
        read_layout("recipes/accelerate/ulysses.yaml", processes=3)
    with pytest.raises(hfpos.PatchError, match="does not fit: yarn"):
        plan(recipe(folder, data={"sources": "b", "length": 100_000}))
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    with pytest.raises(hfpos.PatchError, match="expected a config of accelerate"):
        read_layout(tmp_path / "list.yaml")
