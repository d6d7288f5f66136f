"""Training runs for tests: the `hfpos` command in this process, in a folder of its own, on a handful of the standard library's files."""

import contextlib
import io
import json
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hfpos.data import sources
from hfpos.data.corpus import Document
from hfpos.train.trainer import LongContextTrainer
from tests.command_line import run


RECIPES = Path(__file__).parents[2] / "recipes"
FILES = "argparse.py ast.py bdb.py calendar.py cmd.py codecs.py csv.py difflib.py doctest.py enum.py".split()
# A few steps on the small model of `base-llama`, with another step's loss in each line of the log.
QUICK = """
model: {path: runs/tiny/base-llama/model}
scheme: {name: yarn, factor: 4}
data: {sources: {path: stdlib, split: train}, length: 64}
training:
  output_dir: runs/quick
  max_steps: 4
  per_device_train_batch_size: 2
  learning_rate: 1e-2
  logging_steps: 1
  save_steps: 2
  disable_tqdm: true
"""


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it printed."""

    code: int
    out: str
    error: str


class Workshop:
    """A folder in which commands run as a user's would, with a short standard library.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ended: dict[str, Ran] = {}
        self.quick = folder / "quick.yaml"
        self.quick.write_text(QUICK, encoding="utf-8")

    def hfpos(self, *arguments: Any) -> Ran:
        """`hfpos ARGUMENTS`."""
        out, error = io.StringIO(), io.StringIO()
        with contextlib.ExitStack() as stack:
            patched = stack.enter_context(pytest.MonkeyPatch.context())
            stack.enter_context(contextlib.redirect_stdout(out))
            stack.enter_context(contextlib.redirect_stderr(error))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated")  # PEFT's call
            patched.chdir(self.folder)
            patched.setenv("HFPOS_CACHE", str(self.folder / "cache"))
            patched.setattr(sources, "standard_library", library)
            return Ran(run(patched, *arguments), out.getvalue(), error.getvalue())

    def train(self, output: str, *changes: str, recipe: Path | None = None) -> Ran:
        """`hfpos train` of the quick recipe, or of another, into a folder."""
        return self.hfpos("train", recipe or self.quick, f"training.output_dir={output}", *changes)

    def tiny(self, name: str) -> Path:
        """The run folder of a recipe in recipes/tiny, which runs once, in fewer steps, after those that its launch lines name."""
        folder = self.folder / "runs" / "tiny" / name
        if name not in self.ended:
            base = name.startswith("base-")
            steps = (
                ["training.max_steps=8"]
                if base
                else ["training.max_steps=2", "training.eval_steps=2", "training.save_steps=2"]
            )
            few = [
                *steps,
                "training.warmup_steps=0",
                "training.logging_steps=1",
                "training.disable_tqdm=true",
                "evaluation.max_documents=2",
            ]
            words = ["model.tokenizer=300"] if base else []
            self.ended[name] = self.hfpos("train", RECIPES / "tiny" / f"{name}.yaml", *few, *words)
        ran = self.ended[name]
        assert ran.code == 0, ran.error
        return folder


def library(min_characters: int = 0) -> list[Document]:
    """What stands for the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [Document(name, (root / name).read_text(encoding="utf-8")[:12_000]) for name in FILES]


class Stopped(BaseException):
    """The end of a run from outside, which no handler of errors sees."""


@contextlib.contextmanager
def stopping(step, how=None):
    """Let runs end in the middle of a step, counted from 1: by `Stopped`, or by what `how()` does."""

    def train(trainer, *arguments, **options):
        if trainer.state.global_step + 1 == step:
            if how is None:
                raise Stopped
            how()
        return whole(trainer, *arguments, **options)

    whole = LongContextTrainer.training_step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LongContextTrainer, "training_step", train)
        yield


def results(folder: Path) -> dict[str, Any]:
    """What a run's `run.json` holds."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def history(folder: Path, step: int) -> list[dict[str, Any]]:
    """The log of a run up to a checkpoint."""
    state = (folder / f"checkpoint-{step}" / "trainer_state.json").read_text(encoding="utf-8")
    return json.loads(state)["log_history"]
