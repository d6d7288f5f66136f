"""Runs that cannot go on say so in one line that names the item, with exit code 2, and leave what was good."""

import errno
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

import hfpos
from tests.train.runs import history


@pytest.fixture
def output(workshop):
    """The folder of a run, taken away afterwards."""
    yield workshop.folder / "runs" / "bad"
    shutil.rmtree(workshop.folder / "runs" / "bad", ignore_errors=True)


def refused(ran, *messages):
    """The line that was printed last."""
    assert ran.code == 2, ran.out[-500:] + ran.error
    line = ran.error.strip().splitlines()[-1]
    assert line.startswith("hfpos: ")
    for message in messages:
        assert message in line
    return line


MEASURED = "evaluation={data: stdlib, split: held_out, lengths: [32, 64], max_documents: 1}"


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (["data.sources.text_column=body", "data.sources.path=rows.jsonl", "data.sources.split=null"], ['"body"']),
        (["data.sources.min_tokens=1000000"], ["1,000,000 tokens", "min_tokens"]),
        (["data.packing=blocks", "data.length=256", "data.sources={path: rows.jsonl}"], ["256"]),
        (["data.sources=nowhere.txt"], ["nowhere.txt"]),
        (["data.length=600"], ["data.length=600 does not fit", "yarn", "reaches 512 tokens"]),
        (
            ["data.positions={kind: pose, target_length: 513}", "data.packing=blocks"],
            ["data.positions.target_length=513 does not fit", "reaches 512"],
        ),
        (
            ["model.path=runs/tiny/base-gpt2/model", "scheme=none", "data.length=129"],
            ["data.length=129", "reaches 128 tokens"],
        ),
        (
            ["model.path=runs/tiny/base-gpt2/model", "scheme={name: learned, target_length: 256}", "data.length=257"],
            ["data.length=257", "reaches 256 tokens"],
        ),
        (["model.path=./nothing-here"], ["nothing-here"]),
        (["model.tokenizer=./nothing-here"], ["nothing-here"]),
        (["training.per_device_train_batch_size=100000"], ["samples of 64 tokens", "takes 100000"]),
        ([MEASURED, "evaluation.lengths=[32, 100000]"], ["100000"]),
        ([MEASURED, "evaluation.patience=1", "training.load_best_model_at_end=true"], ["training"]),
        ([MEASURED, "evaluation.lengths=[256]", "evaluation.max_regression=0.01"], ["[256] has none"]),
        (["lora.targets=[q_prj]"], ["lora.targets", "'q_prj'"]),
        (["lora.train=[embedings]"], ["lora.train", "'embedings'"]),
        (["training.learning_rate=much"], ["training.learning_rate='much'; expected a number"]),
        (["training.save_total_limit=2.5"], ["training.save_total_limit=2.5; expected a whole number"]),
        (["training.gradient_checkpointing='no'"], ["training.gradient_checkpointing='no'; expected true or false"]),
        (["training.gradient_checkpointing=1"], ["expected true or false"]),
        (["training.optim=adamw_nope"], ["adamw_nope"]),
        (["scheme={name: t5_bucket}"], ["t5_bucket"]),
    ],
)
def test_what_makes_no_sense_is_named_before_training(workshop, output, changes, messages):
    (workshop.folder / "rows.jsonl").write_text(json.dumps({"text": "a few words only"}), encoding="utf-8")
    refused(workshop.train("runs/bad", *changes), *messages)
    assert not list(output.glob("checkpoint-*"))


def test_packages_that_are_missing(workshop, output, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(workshop.train("runs/bad", "lora={r: 4}"), "peft is not installed", "hfpos[peft]")


def test_models_that_are_not_whole(workshop, output, tmp_path):
    adapter = workshop.tiny("llama2-7b-lora-yarn-32k") / "model"
    refused(workshop.train("runs/bad", f"model.path={adapter}"), "is a PEFT adapter", "merge")
    shutil.copytree(
        workshop.folder / "runs/tiny/base-llama/model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")
    )
    refused(workshop.train("runs/bad2", f"model.path={tmp_path / 'bare'}"), "no tokenizer", "bare")
    shutil.rmtree(workshop.folder / "runs/bad2")


def test_a_loss_that_is_not_a_number_names_the_step_and_the_sample(workshop, output, tmp_path):
    spoiled = tmp_path / "spoiled"
    shutil.copytree(workshop.folder / "runs/tiny/base-llama/model", spoiled)
    weights = load_file(spoiled / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, spoiled / "model.safetensors", metadata={"format": "pt"})
    refused(
        workshop.train("runs/bad", f"model.path={spoiled}", "scheme=none"),
        "the loss became nan at step 1, on ",
        ".py, tokens",
        "training.learning_rate",
    )
    assert not list(output.glob("checkpoint-*"))


def test_a_loss_that_explodes_leaves_the_checkpoint_before(workshop, output, monkeypatch):
    def explode(trainer, *arguments, **options):
        loss = whole(trainer, *arguments, **options)
        return loss * float("inf") if trainer.state.global_step == 3 else loss

    whole = Trainer.training_step
    monkeypatch.setattr(Trainer, "training_step", explode)
    line = refused(workshop.train("runs/bad"), "the loss became inf at step 4")
    assert line.count(", tokens") == 2  # both samples of the batch
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_out_of_memory_says_what_helps(workshop, output, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(Trainer, "compute_loss", fail)
    said = ("out of memory at data.length=64 with 2 samples", "training.gradient_checkpointing: true", "`hfpos plan`")
    refused(workshop.train("runs/bad"), *said)


def test_a_full_disk_leaves_the_checkpoint_before_and_the_same_command_goes_on(workshop, output, monkeypatch):
    def full(trainer, folder=None, *arguments, **options):
        whole(trainer, folder, *arguments, **options)
        if "checkpoint-4" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    whole = Trainer.save_model
    with monkeypatch.context() as disk:
        disk.setattr(Trainer, "save_model", full)
        refused(
            workshop.train("runs/bad"),
            "checkpoint of step 4 could not be written",
            "No space left",
            "same command again",
        )
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    assert [each["step"] for each in history(output, 2)] == [1, 2]
    again = workshop.train("runs/bad")
    assert again.code == 0, again.error
    assert "going on from runs/bad/checkpoint-2" in again.out
    hfpos.from_pretrained(output / "model")


def test_a_disk_that_is_full_at_the_end_leaves_no_half_model(workshop, output, monkeypatch):
    def full(trainer, folder=None, *arguments, **options):
        whole(trainer, folder, *arguments, **options)
        if "checkpoint" not in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")

    whole = Trainer.save_model
    with monkeypatch.context() as disk:
        disk.setattr(Trainer, "save_model", full)
        refused(workshop.train("runs/bad"), "the model could not be written", "No space left", "same command again")
    assert not (output / "model").exists()
    again = workshop.train("runs/bad")
    assert again.code == 0, again.error
    assert (output / "model" / "config.json").exists()
    assert "going on from runs/bad/checkpoint-4" in again.out


def test_weights_in_float16(workshop, output):
    refused(workshop.train("runs/bad", "model.dtype=float16"), "weights to train are float16", "bfloat16")
