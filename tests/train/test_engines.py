"""Two processes are one: DDP, FSDP2 and DeepSpeed's engines give the losses, gradients and weights of a single process, on a CPU.

All engines run in one pair of processes, which takes on the environment that `accelerate launch` makes of each file in recipes/accelerate.
"""

import contextlib
import gc
import json
import os
import random
import sys
from unittest.mock import patch

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hfpos
from hfpos.train.recipe import Recipe
from hfpos.train.run import run
from tests.processes import leave, start, torchrun
from tests.train.runs import RECIPES, Stopped, history, results, stopping


STEPS = 3
# With so large an epsilon Adam's steps depend on the size of gradients. Short documents make rows of few labels.
RECIPE = """
model: {path: runs/tiny/base-llama/model}
data: {sources: uneven.jsonl, length: 48}
training:
  output_dir: runs/engines
  max_steps: 3
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 2
  learning_rate: 0.01
  lr_scheduler_type: constant
  adam_epsilon: 1e-3
  logging_steps: 1
  save_steps: 1
  save_total_limit: 1
  report_to: none
  disable_tqdm: true
"""
SCHEMES = {"yarn": ["scheme=yarn", "scheme.factor=4"], "alibi": ["scheme=alibi"], "kerple": ["scheme=kerple"]}
JOINED = "data.packing=joined"


def changes(engine, scheme):
    """The same four rows a step everywhere: the processes of Ulysses share each row, the others take a row each."""
    rows = 4 if engine in ("one", "ulysses") else 2
    given = [
        f"training.output_dir=runs/engines/{engine}-{scheme}",
        f"training.gradient_accumulation_steps={rows}",
        *SCHEMES[scheme],
    ]
    return given + ([JOINED] if scheme == "yarn" else [])  # yarn is plain sdpa, to which Ulysses hands on no mask


def environment(engine):
    """What `accelerate launch` sets for two processes on a CPU."""
    config = RECIPES / "accelerate" / f"{engine}.yaml"
    options = [
        "--config_file",
        str(config),
        "--num_processes=2",
        "--mixed_precision=no",
        "--main_process_port=0",
        "unused.py",
    ]
    found = {}
    with patch("torch.distributed.run.run", lambda arguments: found.update(os.environ)):
        launch_command(launch_command_parser().parse_args(options))
    return {
        name: value
        for name, value in found.items()
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))
    }


def process_main(*engines):
    """What each process does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    gc.freeze()  # Trainer collects garbage in every run, and what was imported is none
    plain = dict(os.environ)
    for engine in engines:
        os.environ.clear()
        os.environ.update(plain | environment(engine))
        for scheme in SCHEMES:
            recipe = Recipe.load("engines.yaml", changes(engine, scheme))
            if scheme == "kerple":  # and once more from its second checkpoint on
                forget()
                with stopping(STEPS), contextlib.suppress(Stopped):
                    run(recipe)
            forget()
            run(recipe)
    leave()


def forget():
    """Take back what a run left in the process for the next one: a user's process has one run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    ALL_ATTENTION_FUNCTIONS._local_mapping.clear()  # where DeepSpeed enters its own
    parallel_state_sp._release_sequence_parallel_groups()


def write(folder):
    """The recipe and its text: documents of 1 word and of 60."""
    (folder / "engines.yaml").write_text(RECIPE, encoding="utf-8")
    draw = random.Random(0)
    words = "the cat sat on mat def return import class self".split()
    rows = [" ".join(draw.choices(words, k=draw.choice([1, 1, 1, 1, 60]))) for _ in range(300)]
    (folder / "uneven.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def alone(workshop):
    """The same runs in this process."""
    write(workshop.folder)
    for scheme in SCHEMES:
        ran = workshop.hfpos("train", "engines.yaml", *changes("one", scheme))
        assert ran.code == 0, ran.error
    return workshop.folder


def compare(folder, engine, scheme):
    one, several = folder / f"runs/engines/one-{scheme}", folder / f"runs/engines/{engine}-{scheme}"
    expected, found = history(one, STEPS), history(several, STEPS)
    assert [each["step"] for each in found] == list(range(1, STEPS + 1))
    for before, now in zip(expected, found, strict=True):
        assert now["loss"] == pytest.approx(before["loss"], rel=1e-4)
        assert now["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-4)
    weights, same = (hfpos.from_pretrained(each / "model").state_dict() for each in (one, several))
    assert weights.keys() == same.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, rtol=1e-4, atol=1e-5)
    held = 24 if engine == "ulysses" else 48
    assert results(several)["numbers"] == results(one)["numbers"] | {"micro_batch_tokens": held}


@pytest.mark.parametrize(
    "engines", [["ddp", "fsdp2", "ulysses"], pytest.param(["zero2", "zero3"], marks=pytest.mark.slow)], ids=" ".join
)
def test_every_scheme_on_every_engine(alone, monkeypatch, engines):
    monkeypatch.chdir(alone)
    torchrun("-m", __name__, *engines, HFPOS_CACHE=str(alone / "cache"), DS_ACCELERATOR="cpu")
    for engine in engines:
        for scheme in SCHEMES:
            compare(alone, engine, scheme)


def test_the_command_that_is_documented(alone, monkeypatch):
    monkeypatch.chdir(alone)
    launch = [
        "--config_file",
        str(RECIPES / "accelerate/ddp.yaml"),
        "--num_processes=2",
        "--mixed_precision=no",
        "--main_process_port=0",
    ]
    given = changes("launched", "kerple")
    ran = start(
        "accelerate.commands.launch",
        *launch,
        "-m",
        "hfpos.train",
        "engines.yaml",
        *given,
        HFPOS_CACHE=str(alone / "cache"),
    )
    assert ran.stdout.count("engine: DDP, 2 processes") == 1
    compare(alone, "launched", "kerple")


if __name__ == "__main__":
    process_main(*sys.argv[1:])
