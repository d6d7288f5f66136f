"""What a run prints, measures, keeps and writes."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hfpos
from hfpos.train.measure import Measure
from hfpos.train.numbers import numbers
from hfpos.train.recipe import Recipe
from tests.train.runs import history, results


MEASURED = [
    "evaluation={data: stdlib, split: held_out, lengths: [64, 128], blocks: true, max_documents: 2}",
    "training.eval_strategy=steps",
    "training.eval_steps=2",
]
BEST = [*MEASURED, "training.load_best_model_at_end=true", "training.max_steps=8", "training.save_total_limit=8"]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def measured(workshop):
    """A run with retrieval, the folder it was in, and how it ended."""
    ran = workshop.train("runs/measured", *MEASURED, "evaluation.retrieval=[key_value]", "evaluation.trials=1")
    assert ran.code == 0, ran.error
    return workshop.folder / "runs/measured", ran


def test_the_baseline_is_the_unpatched_models_and_comes_first(workshop, measured):
    folder, ran = measured
    base = results(workshop.folder / "runs/tiny/base-llama")["after"]
    found = results(folder)["baseline"]
    assert found == {length: pytest.approx(base[f"perplexity_at_{length}"], rel=1e-5) for length in ("64", "128")}
    before, start = ran.out.index("before patching: perplexity"), ran.out.index("step 0: perplexity")
    assert ran.out.index("tokens in all") < before < start < ran.out.index("step 2: perplexity")
    assert f"before patching: perplexity {found['64']:.4g} at 64, {found['128']:.4g} at 128" in ran.out


def test_evaluations_are_logged_and_kept(measured):
    folder, _ = measured
    names = {"perplexity_at_64", "perplexity_at_128", "key_value_at_64", "key_value_at_128", "regression", "score"}
    logged = [each for each in history(folder, 4) if "eval_score" in each]
    kept = results(folder)["evaluations"]
    assert [each["step"] for each in logged] == [each["step"] for each in kept] == [0, 2, 4]
    for log, entry in zip(logged, kept, strict=True):
        assert entry.keys() - {"step"} == names
        assert {name: log[f"eval_{name}"] for name in names} == {name: entry[name] for name in names}
        assert entry["score"] == entry["perplexity_at_128"]
    assert kept[-1]["score"] < kept[0]["score"]  # it learned something
    assert results(folder)["after"] == {name: kept[-1][name] for name in names}
    baseline = results(folder)["baseline"]
    worst = max(kept[-1][f"perplexity_at_{length}"] / baseline[length] for length in baseline) - 1
    assert kept[-1]["regression"] == pytest.approx(worst)


def test_the_folder_says_how_the_model_came_to_be(workshop, measured):
    folder, _ = measured
    found = results(folder)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["transformers"] == transformers.__version__
    assert found["engine"] == "one process"
    assert found["data"]["samples"] > 100
    assert found["train"]["train_loss"] > 0
    assert "cpu" in str(found).lower()  # the hardware
    written = Recipe.load(folder / "recipe.yaml")
    changes = [
        f"training.output_dir={'runs/measured'}",
        *MEASURED,
        "evaluation.retrieval=[key_value]",
        "evaluation.trials=1",
    ]
    assert written == Recipe.load(workshop.quick, changes)
    assert "packing: documents" in (folder / "recipe.yaml").read_text(encoding="utf-8")  # a default
    assert list(folder.rglob("events.out.tfevents.*"))


def scripted(monkeypatch, *values):
    """Perplexities at 64 and 128 of the baseline and of each evaluation, the last one again and again."""
    left = list(values)

    def perplexities(self, model, lengths=None):
        short, long = left.pop(0) if len(left) > 1 else left[0]
        return {64: short, 128: long}

    monkeypatch.setattr(Measure, "perplexities", perplexities)


def test_the_best_checkpoint_is_the_best_at_length_that_passes_the_gate(workshop, monkeypatch):
    scripted(monkeypatch, (100, 900), (100, 800), (150, 50), (100.5, 80), (100, 90), (100, 85), (100.5, 80))
    ran = workshop.train("runs/gated", *BEST, "evaluation.max_regression=0.01")
    assert ran.code == 0, ran.error
    folder = workshop.folder / "runs/gated"
    found = results(folder)
    assert [each["score"] for each in found["evaluations"]] == [800, None, 80, 90, 85]
    assert found["best_checkpoint"].endswith("checkpoint-4")
    assert found["after"]["score"] == 80
    best, last = weights(folder / "checkpoint-4"), weights(folder / "checkpoint-8")
    saved = weights(folder / "model")
    assert all(torch.equal(saved[name], weight) for name, weight in best.items())
    assert any(not torch.equal(saved[name], weight) for name, weight in last.items())


def test_a_run_stops_when_patience_ends(workshop, monkeypatch):
    scripted(monkeypatch, (9, 9), (9, 9), (9, 5), (9, 6), (9, 7), (9, 5))
    ran = workshop.train("runs/patient", *BEST, "evaluation.patience=2")
    assert ran.code == 0, ran.error
    found = results(workshop.folder / "runs/patient")
    assert [each["step"] for each in found["evaluations"]] == [0, 2, 4, 6]
    assert found["best_checkpoint"].endswith("checkpoint-2")


def test_a_result_that_is_worse_at_short_context_is_exit_code_1(workshop):
    ran = workshop.train("runs/worse", *MEASURED, "training.learning_rate=1.0", "evaluation.max_regression=0")
    assert ran.code == 1
    after = results(workshop.folder / "runs/worse")["after"]
    assert after["regression"] > 0
    assert after["score"] is None
    assert f"short context got worse by {100 * after['regression']:.1f} %" in ran.error
    assert math.isfinite(after["perplexity_at_128"])
    hfpos.from_pretrained(workshop.folder / "runs/worse/model")


def test_accumulation_is_one_larger_batch(workshop):
    plain = ["training.optim=sgd", "training.learning_rate=0.3", "training.lr_scheduler_type=constant", "scheme=none"]
    shapes = {"whole": (4, 1), "parts": (1, 4)}
    for name, (batch, parts) in shapes.items():
        sizes = [f"training.per_device_train_batch_size={batch}", f"training.gradient_accumulation_steps={parts}"]
        ran = workshop.train(f"runs/{name}", *plain, *sizes)
        assert ran.code == 0, ran.error
        assert f"tokens of a step: {batch} x 64 x {parts} (accumulation) x 1 (replicas) = 256" in ran.out
    whole, parts = (workshop.folder / "runs" / name for name in shapes)
    for one, other in zip(history(whole, 4), history(parts, 4), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for name, weight in weights(whole / "model").items():
        torch.testing.assert_close(weights(parts / "model")[name], weight, rtol=1e-5, atol=1e-6)


def test_steps_of_epochs_are_those_that_are_made(workshop):
    changes = [
        "data.sources.max_tokens=900",
        "training.num_train_epochs=1.5",
        "training.gradient_accumulation_steps=2",
    ]
    ran = workshop.train("runs/epochs", *changes, "training.max_steps=-1", "training.save_strategy='no'")
    assert ran.code == 0, ran.error
    found = results(workshop.folder / "runs/epochs")
    samples = found["data"]["samples"]
    steps = math.ceil(1.5 * math.ceil(samples // 2 / 2))
    assert found["numbers"] == {
        "micro_batch_tokens": 128,
        "step_tokens": 256,
        "steps": steps,
        "total_tokens": 256 * steps,
    }
    assert ran.out.count("'grad_norm'") == steps


@pytest.mark.parametrize(
    ("processes", "sequence", "micro_batch", "step", "steps"),
    [(1, 1, 600, 1800, 17), (4, 1, 600, 7200, 4), (4, 2, 300, 3600, 9)],
)
def test_numbers_of_several_processes(processes, sequence, micro_batch, step, steps):
    arguments = SimpleNamespace(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        dataloader_drop_last=True,
        max_steps=-1,
        num_train_epochs=1,
    )
    found = numbers(arguments, length=300, samples=101, processes=processes, sequence=sequence)
    assert (found.micro_batch_tokens, found.step_tokens, found.steps) == (micro_batch, step, steps)
    assert found.total_tokens == step * steps
