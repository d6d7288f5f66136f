"""The folder of a training run: one run in it, with its recipe; which of its checkpoints is whole."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hfpos.scheme import PatchError
from hfpos.train.recipe import Recipe
from hfpos.train.yaml_files import load_yaml


RECIPE, RESULTS, MODEL, LOCK = "recipe.yaml", "run.json", "model", "run.lock"
CHECKPOINT = "checkpoint-"


class RunFolder:
    """What lies in `training.output_dir`: `recipe.yaml`, `run.json`, checkpoints and, at the end, `model`.

    Args:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model = self.path / MODEL
        self._lock = FileLock(self.path / LOCK)

    def begin(self, recipe: Recipe) -> None:
        """Take the folder for this recipe, or take it up again: for the main process alone.

        Raises:
            PatchError: another run is at work in it or has finished in it, it was another recipe's, or it holds other files.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise PatchError(
                f"another run is at work in {self.path}; wait for it, or choose another training.output_dir"
            ) from error
        except OSError as error:
            raise PatchError(f"cannot write to {self.path} ({error}); choose another training.output_dir") from error
        if (self.path / RECIPE).exists():
            self._take_up(recipe)
        else:
            others = sorted(path.name for path in self.path.iterdir() if path.name != LOCK)
            if others:
                raise PatchError(
                    f"{self.path} holds files that are of no run ({', '.join(others[:3])}); choose another training.output_dir"
                )
            write_whole(self.path / RECIPE, recipe.dump())

    def end(self) -> None:
        """Let others have the folder."""
        self._lock.release()

    def _take_up(self, recipe: Recipe) -> None:
        if self.model.exists():
            raise PatchError(
                f"{self.path} holds a finished run, its model in {self.model}; choose another training.output_dir, or delete it"
            )
        before, now = load_yaml(self.path / RECIPE), recipe.values()
        different = [
            key for key in _leaves(before) | _leaves(now) if _leaves(before).get(key) != _leaves(now).get(key)
        ]
        if different:
            key = sorted(different)[0]
            raise PatchError(
                f"{self.path} holds a run with another recipe: {key} was {_leaves(before).get(key)!r} and is {_leaves(now).get(key)!r}"
                f"{f' (and {len(different) - 1} more)' if len(different) > 1 else ''}; change it back to go on, or choose another "
                "training.output_dir"
            )
        for checkpoint in self._checkpoints():  # one that was being written when the process was killed
            if not _whole(checkpoint):
                shutil.rmtree(checkpoint)

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint to go on from; None where there is none."""
        return next((path for path in self._checkpoints() if _whole(path)), None)

    def read_results(self) -> dict[str, Any]:
        """What `run.json` holds; empty where there is none."""
        path = self.path / RESULTS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_results(self, results: dict[str, Any]) -> None:
        """Write `run.json`; numbers that are not finite become null, as JSON has none."""
        write_whole(self.path / RESULTS, json.dumps(_finite(results), indent=2, default=str, allow_nan=False) + "\n")

    def _checkpoints(self) -> list[Path]:
        """The newest first."""
        found = [path for path in self.path.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdecimal()]
        return sorted(found, key=lambda path: -int(path.name.removeprefix(CHECKPOINT)))


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step: a killed process leaves the old one or the new one."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise PatchError(
            f"cannot write {path} ({error}); free some room, or choose another training.output_dir"
        ) from error


def _whole(checkpoint: Path) -> bool:
    """Trainer writes its state last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {str(key): _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values as `a.b.c` -> value; lists are leaves but for those of sections."""
    if isinstance(values, dict) and values:
        return {
            key: leaf
            for name in values
            for key, leaf in _leaves(values[name], f"{prefix}.{name}" if prefix else name).items()
        }
    return {prefix: values}
