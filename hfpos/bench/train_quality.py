"""What the recipes make of small models at four times their trained length, on held-out text; each model is trained here first."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hfpos
from hfpos.bench.train_cases import Case, Text
from hfpos.describe import describe
from hfpos.evaluate import perplexity
from hfpos.evaluate.load import load_model, load_text
from hfpos.evaluate.processes import device
from hfpos.scheme import PatchError
from hfpos.train.folder import RECIPE, RESULTS
from hfpos.train.recipe import Recipe
from hfpos.train.run import run


RECIPES = Path(hfpos.__file__).parents[1] / "recipes" / "tiny"
# No measurement on the way, nothing kept but the model: figures are taken here, of all models on the same text
QUIET = (
    "evaluation=null",
    "training.eval_strategy='no'",
    "training.load_best_model_at_end=false",
    "training.save_strategy='no'",
    "training.report_to=none",
    "training.disable_tqdm=true",
    "training.logging_steps=100",
)
Perplexities = dict[int, float]


def extend(name: str, case: Case, folder: Path, text: Text | None = None) -> dict[str, Any]:
    """Train the model (unless `folder` has it), extend it by the recipe, and measure it before, after, and beside a control.

    Args:
        name: of the model's folder.
        folder: where trained base models stay, for the next time.
    """
    text = text or Text()
    base, base_run = trained_base(name, case, folder, text)
    ruler = Ruler(base, case.factor, text)
    table = {"unpatched": ruler.measure(base), **_untrained(case, base, ruler)}
    model = (f"model.path={base}", *text.train)
    with tempfile.TemporaryDirectory() as place:
        for row, changes in (("control", case.control), ("recipe", ())):
            found = train(case.recipe, (*model, *case.changes, *changes), Path(place, row))
            table[row] = ruler.measure(Path(place, row, "model"))
    tokens, base_tokens = found["numbers"]["total_tokens"], base_run["numbers"]["total_tokens"]
    return {
        "base": {
            "recipe": case.base,
            "changes": case.base_changes,
            "tokens": base_tokens,
            "tokens_a_second": round(base_tokens / base_run["train"]["train_runtime"]),
        },
        "recipe": {"recipe": case.recipe, "changes": case.changes, "tokens": tokens},
        "control_changes": case.control,
        "share_of_pretraining_tokens": round(tokens / base_tokens, 4),
        "trained_length": ruler.short,
        "length": ruler.long,
        "perplexity": {row: {n: round(value, 3) for n, value in found.items()} for row, found in table.items()},
        "worst_to_best_before_fine_tuning": sorted(
            (row for row in ("unpatched", *case.schemes) if ruler.long in table[row]),
            key=lambda row: -table[row][ruler.long],
        ),
        **_ratios(table, ruler.short, ruler.long),
    }


def trained_base(name: str, case: Case, folder: Path, text: Text) -> tuple[Path, dict[str, Any]]:
    """The folder of the base model and what its run found; trained now unless it was before, by the same recipe.

    Raises:
        PatchError: the folder holds the model of another recipe.
    """
    out = folder / name
    changes = (*case.base_changes, *text.train)
    recipe = _recipe(case.base, changes, out)
    if (out / "model").exists() and (out / RECIPE).read_text(encoding="utf-8") == recipe.dump():
        return out / "model", json.loads((out / RESULTS).read_text(encoding="utf-8"))
    return out / "model", train(case.base, changes, out)


def train(name: str, changes: Sequence[str], out: Path) -> dict[str, Any]:
    """Run a recipe of recipes/tiny/ with changes."""
    return run(_recipe(name, changes, out))


class Ruler:
    """Measures models on the same held-out text, at the trained length and beyond: every token of each block is scored at each length,
    in disjoint windows.

    Args:
        base: folder of the base model, whose trained length and tokenizer count.
        factor: the longer length is so many times the trained one.
    """

    def __init__(self, base: Path, factor: int, text: Text) -> None:
        model, tokenizer = load_model(str(base))
        found = describe(model)
        if found.trained_length is None:
            raise PatchError(f"{base} does not say its trained length; expected a base model whose config does")
        self.short, self.long = found.trained_length, factor * found.trained_length
        self.documents = load_text(
            text.held_out,
            tokenizer,
            str(base),
            split=text.split,
            block_tokens=self.long,
            max_documents=text.documents,
        )

    def measure(self, model: Any) -> Perplexities:
        """Of a model or the folder of one; a learned table has no positions beyond its length, and no figure there."""
        if isinstance(model, Path):
            model = hfpos.from_pretrained(str(model)).to(device())
        lengths = describe(model).within_table([self.short, self.long])
        scores = perplexity(model, self.documents, lengths, "window").by_length
        return {length: score.perplexity for length, score in scores.items()}


def _untrained(case: Case, base: Path, ruler: Ruler) -> dict[str, Perplexities]:
    model = hfpos.from_pretrained(str(base)).to(device())
    table = {}
    for scheme in case.schemes:
        with hfpos.patched(model, scheme, factor=case.factor):
            table[scheme] = ruler.measure(model)
    return table


def _ratios(table: dict[str, Perplexities], short: int, long: int) -> dict[str, float | None]:
    """Against the unpatched model at its trained length, but for the last: at the longer one."""
    before, after, control = table["unpatched"], table["recipe"], table["control"]
    return {
        "unpatched_long_over_short": round(before[long] / before[short], 4) if long in before else None,
        "recipe_long_over_unpatched_short": round(after[long] / before[short], 4),
        "short_context_cost": round(after[short] / before[short] - 1, 4),
        "control_short_context_cost": round(control[short] / before[short] - 1, 4),
        "long_over_unpatched_long": round(after[long] / before[long], 4) if long in before else None,
    }


def _recipe(name: str, changes: Sequence[str], out: Path) -> Recipe:
    path = RECIPES / f"{name}.yaml"
    if not path.exists():
        raise PatchError(
            f"{path} is not there; expected the recipes of the repository: run this benchmark from a clone"
        )
    return Recipe.load(path, (*changes, *QUIET, f"training.output_dir={out}"))
