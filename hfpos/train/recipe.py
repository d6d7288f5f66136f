"""A training recipe: a small YAML file, read strictly, with `key=value` changes from the command line."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError, field_validator

from hfpos.scheme import PatchError, did_you_mean
from hfpos.train.sections import Data, Evaluation, Lora, Model, Positions, Section, Source
from hfpos.train.yaml_files import dump_yaml, load_yaml


if TYPE_CHECKING:
    from hfpos.scheme import Scheme

UNPATCHED = "none"
# Names of `TrainingArguments` that would contradict what the rest of the recipe says.
_OURS = {
    "remove_unused_columns": "the collator already gives the model what it takes",
    "resume_from_checkpoint": "the same command goes on where a killed run was",
    "do_train": "training is what a recipe does",
    "do_eval": "set evaluation.data, and training.eval_strategy for when",
    "do_predict": "training is what a recipe does",
    "use_cache": "training has no cache",
    "label_names": "the labels are the tokens",
}


class Recipe(Section):
    """A whole recipe.

    Attributes:
        scheme: the name and the parameters of the scheme that the model is patched with; none keeps the model as it is.
        layers: the layers that get it, as for `hfpos.patch`; all unless given.

    >>> recipe = Recipe.parse({"model": {"path": "m"}, "scheme": {"name": "yarn", "factor": 4},
    ...                        "data": {"sources": "book.txt", "length": 512}, "training": {"output_dir": "out", "max_steps": 10}})
    >>> str(recipe.create_scheme()), recipe.data.sources[0].path
    ('yarn(factor=4)', 'book.txt')
    >>> Recipe.parse({"modle": {"path": "m"}})
    Traceback (most recent call last):
    ...
    hfpos.scheme.PatchError: the recipe has no key 'modle': did you mean 'model'? Available: data, evaluation, layers, lora, model, scheme, training
    """

    model: Model
    scheme: dict[str, Any] | None = None
    layers: str | list[Any] | None = None
    data: Data
    lora: Lora | None = None
    training: dict[str, Any]
    evaluation: Evaluation | None = None

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = ()) -> Recipe:
        """Read a YAML file and change it by `key=value`, e.g. `training.max_steps=10`; values are YAML.

        Raises:
            PatchError: no such file, no YAML, unknown or missing keys, values of the wrong kind.
        """
        values = load_yaml(path)
        for change in changes:
            _change(values, change)
        return cls.parse(values, str(path))

    @classmethod
    def parse(cls, values: Any, name: str = "the recipe") -> Recipe:
        """Check plain values; `name` stands in errors."""
        if not isinstance(values, dict):
            raise PatchError(
                f"{name} holds a {type(values).__name__}; expected the keys {', '.join(cls.model_fields)}"
            )
        try:
            recipe = cls.model_validate(values)
        except ValidationError as error:
            raise PatchError(_explain(error, name)) from error
        if recipe.create_scheme() is None and recipe.layers is not None:
            raise PatchError(f"{name} has layers but no scheme that they get; add scheme, or leave layers out")
        recipe._check_training(name)
        recipe._check_together(name)
        return recipe

    @field_validator("scheme", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value in (None, UNPATCHED):
            return None
        return {"name": value} if isinstance(value, str) else value

    def create_scheme(self) -> Scheme | None:
        """The scheme that the model is patched with; None for none."""
        from hfpos.schemes import REGISTRY

        if self.scheme is None:
            return None
        parameters = dict(self.scheme)
        name = parameters.pop("name", None)
        if not isinstance(name, str):
            raise PatchError(f"scheme={self.scheme!r} has no name; expected e.g. {{name: yarn, factor: 4}}")
        return REGISTRY[name].create(**parameters)

    def values(self) -> dict[str, Any]:
        """Everything, defaults included, as plain values."""
        return self.model_dump(mode="json")

    def dump(self) -> str:
        """The whole recipe as YAML, defaults included."""
        return dump_yaml(self.values())

    def _check_training(self, name: str) -> None:
        from transformers import TrainingArguments

        known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
        for key in self.training:
            if key in _OURS:
                raise PatchError(f"{name}: training.{key} cannot be set: {_OURS[key]}")
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "see transformers.TrainingArguments"
                raise PatchError(f"{name}: training has no key {key!r}: {hint}")
        if not isinstance(self.training.get("output_dir"), str):
            raise PatchError(f"{name}: training.output_dir is missing; expected the folder of the run")

    def _check_together(self, name: str) -> None:
        positions, data, evaluation = self.data.positions, self.data, self.evaluation
        if positions is not None and positions.target_length < data.length:
            raise PatchError(
                f"{name}: data.positions.target_length={positions.target_length} is below data.length={data.length}; "
                "expected the longer context that the positions are drawn from"
            )
        if positions is not None and data.packing == "documents":
            raise PatchError(
                f"{name}: data.positions={positions.kind} gives each sample one run of positions, and data.packing=documents one for each "
                "document; set data.packing to blocks or joined"
            )
        if self.lora is not None and self.model.config is not None:
            raise PatchError(
                f"{name}: lora: names the model below it when it is saved, and model.config makes one without a name; give model.path"
            )
        if self.model.quantization is not None and self.lora is None:
            raise PatchError(
                f"{name}: model.quantization={self.model.quantization} can only be trained through lora; add lora:"
            )
        if evaluation is None:
            for key in ("load_best_model_at_end", "eval_on_start"):
                if self.training.get(key):
                    raise PatchError(f"{name}: training.{key} needs evaluation:, which says what to measure on")
            if self.training.get("eval_strategy", "no") not in ("no", False):
                raise PatchError(f"{name}: training.eval_strategy needs evaluation:, which says what to measure on")
            return
        if evaluation.patience is not None and not self.training.get("load_best_model_at_end"):
            raise PatchError(
                f"{name}: evaluation.patience needs training.load_best_model_at_end and training.eval_strategy"
            )
        if evaluation.max_regression is not None and self.model.config is not None:
            raise PatchError(
                f"{name}: evaluation.max_regression compares with the model before it is patched, and model.config makes a new one; leave it out"
            )
        if evaluation.max_regression is not None and not evaluation.baseline:
            raise PatchError(
                f"{name}: evaluation.max_regression is measured against the baseline; set evaluation.baseline to true"
            )


def _change(values: Any, change: str) -> None:
    """Put one `a.b.c=value` into nested values."""
    path, given, text = change.partition("=")
    keys = path.split(".")
    if not given or not all(keys):
        raise PatchError(f"{change!r} is not a change of the recipe; expected key=value, e.g. training.max_steps=10")
    try:
        value = load_yaml(text, is_text=True)
    except yaml.YAMLError as error:
        raise PatchError(f"{change!r}: the value is not YAML ({error})") from error
    for key in keys[:-1]:
        if isinstance(values, list):
            values = _item(values, key, change)
            continue
        below = values.get(key)
        if isinstance(below, str) and key == "scheme":
            below = {"name": below}
        values[key] = below if isinstance(below, (dict, list)) else {}
        values = values[key]
    if isinstance(values, list):
        _item(values, keys[-1], change)
        values[int(keys[-1])] = value
    else:
        values[keys[-1]] = value


def _item(values: list, key: str, change: str) -> Any:
    if not key.isdecimal() or int(key) >= len(values):
        raise PatchError(f"{change!r}: {key!r} is no place in a list of {len(values)}; expected a number from 0")
    return values[int(key)]


def _explain(error: ValidationError, name: str) -> str:
    """The first thing that is wrong, with a suggestion where a key is unknown."""
    # a misspelt key is often a missing one too
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    path = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    where = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in path[:-1]:
            section = _section(section, part)
        parent = f"{name}: {'.'.join(map(str, path[:-1]))}" if path[:-1] else name
        return f"{parent} has no key {path[-1]!r}: {did_you_mean(str(path[-1]), section.model_fields)}"
    if first["type"] == "missing":
        return f"{name}: {where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return (
        f"{name}: {where}={first['input']!r} is not usable: {message}"
        if not isinstance(first["input"], dict)
        else f"{name}: {where}: {message}"
    )


def _section(section: Any, part: Any) -> Any:
    """The class of a section's part; a place in the list of sources stays the class of a source."""
    sections = {
        "model": Model,
        "data": Data,
        "lora": Lora,
        "evaluation": Evaluation,
        "sources": Source,
        "positions": Positions,
    }
    return sections.get(part, section)
