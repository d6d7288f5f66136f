"""A run that was stopped and is started again with the same command is the run that was not: losses, evaluations and weights."""

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hfpos.train.folder import RunFolder
from tests.processes import start
from tests.train.runs import Stopped, Workshop, history, stopping


STEPS = 8
# Three epochs of three steps, two batches a step and one over; what is drawn at random: positions, dropout, the order of samples.
POSE = [
    "data.sources.max_tokens=900",
    "data.packing=blocks",
    "data.positions={kind: pose, target_length: 256}",
    "lora={r: 4, dropout: 0.2}",
    "training.gradient_accumulation_steps=2",
    f"training.max_steps={STEPS}",
    "training.save_steps=3",
]
MEASURED = [
    f"training.max_steps={STEPS}",
    "training.save_steps=2",
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.load_best_model_at_end=true",
    "evaluation={data: stdlib, split: held_out, lengths: [32, 64], max_documents: 1, blocks: true}",
]
# What the clock says, and not the run.
CLOCK = ("runtime", "per_second", "total_flos")


def log(folder):
    entries = history(folder, STEPS)
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in CLOCK)} for entry in entries
    ]


def weights(folder):
    return load_file(next((folder / "model").glob("*.safetensors")))


def same_run(one, other):
    assert log(one) == log(other)
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def begun(workshop, kind):
    """A folder in which no run has been, in which one was not stopped, and the changes of both."""
    changes = {"pose": POSE, "measured": MEASURED}[kind]
    straight = workshop.folder / "runs" / f"straight-{kind}"
    if not straight.exists():
        ran = workshop.train(f"runs/straight-{kind}", *changes)
        assert ran.code == 0, ran.error
    return straight, changes


@pytest.fixture
def output(workshop):
    """The folder of a run, taken away afterwards."""
    yield workshop.folder / "runs" / "stopped"
    shutil.rmtree(workshop.folder / "runs" / "stopped", ignore_errors=True)


def test_a_killed_process(workshop, output):
    straight, changes = begun(workshop, "pose")
    start(__name__, str(workshop.folder), *changes, fails=True)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert not (output / "model").exists()
    again = workshop.train("runs/stopped", *changes)
    assert again.code == 0, again.error
    assert "going on from runs/stopped/checkpoint-6" in again.out
    same_run(straight, output)


def test_half_a_checkpoint(workshop, output):
    straight, changes = begun(workshop, "measured")
    with stopping(7), pytest.raises(Stopped):
        workshop.train("runs/stopped", *changes)
    torn = output / "checkpoint-6" / "trainer_state.json"
    torn.write_text(torn.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert (output / "checkpoint-4" / "trainer_state.json").exists()
    again = workshop.train("runs/stopped", *changes)
    assert "going on from runs/stopped/checkpoint-4" in again.out, again.error
    same_run(straight, output)


def test_before_the_first_checkpoint(workshop, output):
    straight, changes = begun(workshop, "measured")
    with stopping(2), pytest.raises(Stopped):
        workshop.train("runs/stopped", *changes)
    again = workshop.train("runs/stopped", *changes)
    assert "going on" not in again.out, again.error
    same_run(straight, output)


def refused(ran, message):
    assert ran.code == 2
    assert message in ran.error.splitlines()[-1]
    assert ran.error.splitlines()[-1].startswith("hfpos: ")


def test_folders_that_are_taken(workshop):
    straight, changes = begun(workshop, "measured")
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.name != "run.lock"}
    refused(workshop.train("runs/straight-measured", *changes), "holds a finished run")
    shutil.copytree(straight, workshop.folder / "runs/other", ignore=shutil.ignore_patterns("model"))
    refused(
        workshop.train("runs/other", *changes, "training.learning_rate=0.5"),
        "with another recipe: training.learning_rate was 0.01",
    )
    other = RunFolder(straight)
    other._lock.acquire()
    try:
        refused(workshop.train("runs/straight-measured", *changes), "another run is at work")
    finally:
        other.end()
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob("*") if path.name != "run.lock"}


if __name__ == "__main__":
    with stopping(8, how=partial(os.kill, os.getpid(), signal.SIGKILL)):
        Workshop(Path(sys.argv[1])).train("runs/stopped", *sys.argv[2:])
