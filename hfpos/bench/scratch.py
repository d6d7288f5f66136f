"""Small models trained from scratch with one scheme each, all by one recipe: train short, test long.

Ten trainings of the same LLaMA at 128 tokens of the same text, then one comparison at one, two and four times that length. The report
lies in `runs/scratch/report`: the table, perplexity against length, and where the attention of each model looks. Models that are there
already, trained by the same recipe, are not trained again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import typer

from hfpos.bench.train_quality import QUIET, RECIPES
from hfpos.report.joint import joint_scores
from hfpos.report.results import Results, load
from hfpos.scheme import PatchError
from hfpos.train.folder import RECIPE
from hfpos.train.recipe import Recipe


NAME = "scratch"
# As a recipe's `scheme=` names them. What depends on lengths is set for 128 tokens.
SCHEMES = {
    "sinusoidal": "{name: sinusoidal, scale: 0.125}",  # the root of the width, by which a LLaMA does not multiply its embeddings
    "learned": "{name: learned, target_length: 128}",
    "t5": "t5",
    "rope": "rope",
    "alibi": "alibi",
    "kerple": "kerple",
    "sandwich": "sandwich",
    "xpos": "xpos",
    "fire": "{name: fire, threshold: 128}",
    "nope": "nope",
}
LENGTHS = (128, 256, 512)
DOCUMENTS = 128  # of the longest length each
TOGETHER = 4  # trainings at a time, where there are so many cores; so small a model is trained fastest by one


def run(
    folder: Path = Path("runs/scratch"),
    schemes: dict[str, str] | None = None,
    changes: Sequence[str] = (),
    lengths: Sequence[int] = LENGTHS,
    text: Sequence[str] = ("--data", "stdlib", "--data-split", "held_out"),
) -> dict[str, Any]:
    """Train what is not there yet, compare, and return the perplexities; progress goes to stderr.

    Args:
        folder: of the runs and the report.
        schemes: a recipe's scheme by the name of its run; `SCHEMES` unless given.
        changes: of the recipe, key=value.
        lengths: to test at, in tokens.
        text: options of `hfpos compare` that say what to measure on.

    Raises:
        PatchError: a training or the comparison failed, with its last words.
    """
    wanted = SCHEMES if schemes is None else schemes
    cores = torch.get_num_threads()
    waiting = [(name, scheme) for name, scheme in wanted.items() if not _is_trained(folder / name, scheme, changes)]
    with ThreadPoolExecutor(min(cores, TOGETHER)) as pool:
        list(pool.map(lambda each: _train(folder / each[0], each[1], changes), waiting))
    models = [folder / name / "model" for name in wanted]
    joined = ",".join(map(str, lengths))
    options = ("--blocks", "--max-documents", DOCUMENTS, "--attention", lengths[-1], "--out", folder / "report")
    _hfpos("compare", *models, "--lengths", joined, *text, *options, threads=cores)
    figures = _figures(load(folder / "report" / "results.json"), folder)
    typer.echo(table(figures["perplexity"], figures["trained_length"]), err=True)
    return figures


def _train(out: Path, scheme: str, changes: Sequence[str]) -> None:
    typer.echo(f"{out.name} ...", err=True)
    _hfpos("train", RECIPES / f"{NAME}.yaml", *_changes(out, scheme, changes), threads=1)


def _is_trained(out: Path, scheme: str, changes: Sequence[str]) -> bool:
    """Whether the folder holds the model that this recipe makes; `hfpos train` refuses one that another made."""
    recipe = Recipe.load(RECIPES / f"{NAME}.yaml", _changes(out, scheme, changes))
    return (out / "model").exists() and (out / RECIPE).read_text(encoding="utf-8") == recipe.dump()


def _changes(out: Path, scheme: str, changes: Sequence[str]) -> tuple[str, ...]:
    return (f"scheme={scheme}", *changes, *QUIET, f"training.output_dir={out}")


def _hfpos(*arguments: Any, threads: int) -> None:
    """Run the command in a process of its own; a failure is an error with the last line it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "hfpos.cli", *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        words = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()[-1]
        raise PatchError(f"hfpos {' '.join(command[3:5])} ... ended with {ended.returncode}: {words}")


def _figures(results: Results, folder: Path) -> dict[str, Any]:
    """Perplexity by scheme and length; best first at the longest length, those that do not reach it last."""
    found = {
        name: {length: round(score.perplexity, 3) for length, score in result.by_length.items()}
        for name, result in joint_scores(results).items()
    }
    first = results.comparisons[0]
    longest = max(first.protocol.lengths)
    order = sorted(found, key=lambda name: found[name].get(longest, float("inf")))
    return {
        "trained_length": first.model.trained_length,
        "parameters": {name: each.model.parameters for name, each in zip(found, results.comparisons, strict=True)},
        "perplexity": {name: found[name] for name in order},
        "report": str(folder / "report" / "index.html"),
    }


def table(perplexity: dict[str, dict[int, float]], trained: int) -> str:
    """The figures as Markdown.

    >>> print(table({"alibi": {128: 20.0, 256: 19.04}, "learned": {128: 21.0}}, 128))
    | trained from scratch with | 128 (trained) | 256 |
    | --- | --- | --- |
    | `alibi` | 20.0 | 19.0 |
    | `learned` | 21.0 | - |
    """
    lengths = sorted({length for row in perplexity.values() for length in row})
    heads = [f"{length:,}" + (" (trained)" if length == trained else "") for length in lengths]
    lines: list[Iterable[str]] = [["trained from scratch with", *heads], ["---"] * (1 + len(lengths))]
    for name, row in perplexity.items():
        lines.append([f"`{name}`", *(f"{row[length]:.1f}" if length in row else "-" for length in lengths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
