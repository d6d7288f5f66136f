"""Recipes are read strictly: every mistake is named, with the key it is in."""

from pathlib import Path

import pytest

import hfpos
from hfpos.train.arguments import training_arguments
from hfpos.train.model import put_together
from hfpos.train.recipe import Recipe
from tests.tiny import tiny


MINIMAL = """
model: {path: some/model}
scheme: {name: yarn, factor: 4}
data: {sources: book.txt, length: 512}
training: {output_dir: out, learning_rate: 2e-5}
"""


def load(tmp_path, text, *changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return Recipe.load(path, changes)


def test_a_minimal_recipe_and_its_defaults(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    assert recipe.training["learning_rate"] == 2e-5
    assert str(recipe.create_scheme()) == "yarn(factor=4)"
    assert recipe.data.packing == "documents"
    assert [source.path for source in recipe.data.sources] == ["book.txt"]
    assert recipe.evaluation is None
    assert recipe.lora is None


def test_what_is_dumped_is_the_same_recipe(tmp_path):
    recipe = load(tmp_path, MINIMAL, "lora.r=4", "evaluation={data: stdlib, lengths: [128, 512], blocks: true}")
    again = load(tmp_path, recipe.dump())
    assert again == recipe
    assert again.lora.r == 4


def test_changes_reach_every_depth(tmp_path):
    changes = [
        "scheme.factor=8",
        "training.max_steps=3",
        "data.sources.0.weight=2.5",
        "model.path=other",
        "lora={r: 2}",
    ]
    listed = MINIMAL.replace("book.txt", "[{path: book.txt}]")
    recipe = load(tmp_path, listed, *changes)
    assert recipe.scheme["factor"] == 8
    assert recipe.training["max_steps"] == 3
    assert recipe.data.sources[0].weight == 2.5
    assert recipe.model.path == "other"
    assert recipe.lora.r == 2
    assert load(tmp_path, MINIMAL, "scheme=none").create_scheme() is None
    assert str(load(tmp_path, MINIMAL.replace("{name: yarn, factor: 4}", "nope")).create_scheme()) == "nope()"
    assert (
        str(load(tmp_path, MINIMAL.replace("{name: yarn, factor: 4}", "ntk"), "scheme.factor=2").create_scheme())
        == "ntk(factor=2)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["modle.path=x"], "has no key 'modle': did you mean 'model'"),
        (["data.lenght=4"], "data has no key 'lenght': did you mean 'length'"),
        (["data.sources=[{path: a, wieght: 1}]"], "data.sources.0 has no key 'wieght': did you mean 'weight'"),
        (
            ["data.positions={kind: pose, target_length: 999, chunk: 3}"],
            "data.positions has no key 'chunk': did you mean 'chunks'",
        ),
        (["training.learning_rat=1"], "training has no key 'learning_rat': did you mean 'learning_rate'"),
        (["training.resume_from_checkpoint=x"], "training.resume_from_checkpoint cannot be set"),
        (["scheme.factr=4"], "'yarn' has no parameter 'factr': did you mean 'factor'"),
        (["scheme.name=yarm"], "unknown scheme 'yarm': did you mean 'yarn'"),
        (["scheme={factor: 4}"], "has no name"),
        (["data.length=many"], "data.length='many' is not usable"),
        (["data.length=1"], "data.length=1 is not usable"),
        (["data.packing=tight"], "data.packing='tight' is not usable"),
        (["model.config={model_type: llama}"], "either path"),
        (["model={config: {model_type: llama}}"], "a tokenizer"),
        (["model.tokenizer=300"], "trains a new one"),
        (["model.quantization=4bit"], "add lora"),
        (["data.positions={kind: pose, target_length: 100}", "data.packing=blocks"], "is below data.length=512"),
        (["data.positions={kind: pose, target_length: 1000}"], "set data.packing to blocks"),
        (["training.eval_strategy=steps"], "needs evaluation"),
        (["training.load_best_model_at_end=true"], "needs evaluation"),
        (
            ["evaluation={data: x, lengths: [8], max_regression: 0.01, baseline: false}"],
            "measured against the baseline",
        ),
        (["evaluation={data: x, lengths: [8], patience: 2}"], "patience needs"),
        (
            [
                "model={config: {model_type: llama}, tokenizer: 300}",
                "evaluation={data: x, lengths: [8], max_regression: 0.01}",
            ],
            "makes a new one",
        ),
        (["evaluation={data: x, lengths: []}"], "evaluation.lengths"),
        (["training.output_dir=null"], "training.output_dir is missing"),
        (["scheme=none", "layers=[1]"], "has layers but no scheme"),
        (["training"], "expected key=value"),
        (["data.sources=[a]", "data.sources.7.path=x"], "'7' is no place in a list of 1"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(hfpos.PatchError) as error:
        load(tmp_path, MINIMAL, *changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not YAML"),
        ("- a", "holds a list"),
        ("", "holds a NoneType"),
        (MINIMAL + "data: {sources: x, length: 8}\n", "'data' stands twice"),
        ("data: {sources: b, length: 8}\ntraining: {output_dir: o}\n", "model is missing"),
    ],
)
def test_what_is_no_recipe(tmp_path, text, message):
    with pytest.raises(hfpos.PatchError, match=message):
        load(tmp_path, text)


def test_layers_get_the_scheme_that_others_do_not(tmp_path):
    recipe = load(tmp_path, MINIMAL, "scheme=nope", "layers=[1]", "data.length=32", "data.packing=blocks")
    model = put_together(recipe, tiny("llama"), None)
    assert hfpos.describe(model).layers == "0: its own; 1: nope()"


def test_no_is_a_word_for_a_strategy(tmp_path):
    recipe = load(
        tmp_path, MINIMAL, "training.save_strategy=no", "training.eval_strategy=no", "training.report_to=none"
    )
    arguments = training_arguments(recipe)
    assert arguments.save_strategy == "no"
    assert arguments.eval_strategy == "no"


def test_a_file_that_is_not_there():
    with pytest.raises(hfpos.PatchError, match=r"cannot read nowhere\.yaml"):
        Recipe.load("nowhere.yaml")


RECIPES = sorted(Path("recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_needs_and_has_a_tiny_twin(path):
    recipe, twin = Recipe.load(path), Recipe.load(path.parent / "tiny" / path.name)
    header = path.read_text(encoding="utf-8").partition("\nmodel:")[0]
    for word in ("# Source:", "arXiv", "# Launch:", f"recipes/{path.name}", "# Hardware:", "GPU"):
        assert word in header
    assert type(twin.create_scheme()) is type(recipe.create_scheme())
    for part in ("lora", "evaluation"):
        assert (getattr(recipe, part) is None) == (getattr(twin, part) is None)
    for part in ("quantization", "shifted_groups"):
        assert getattr(recipe.model, part) == getattr(twin.model, part)
    assert (recipe.data.positions is None) == (twin.data.positions is None)
    assert recipe.data.packing == twin.data.packing


def test_there_are_recipes():
    assert len(RECIPES) >= 16
