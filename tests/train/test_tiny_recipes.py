"""Every recipe's tiny twin runs through the `hfpos` command, and what it leaves loads: in plain Transformers where that knows the scheme."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hfpos
from hfpos.describe import describe
from hfpos.report.results import load
from tests.train.runs import RECIPES, results


TWINS = sorted(path.stem for path in (RECIPES / "tiny").glob("*.yaml") if (RECIPES / path.name).exists())
ADAPTERS = {"llama2-7b-lora-yarn-32k", "llama2-7b-longlora-32k", "llama2-7b-qlora-yarn-32k"}
STOCK = {
    name for name in TWINS if any(word in name for word in ("yarn", "-pi-", "ntk", "longrope", "pose"))
} - ADAPTERS
IDS = torch.randint(
    3, 290, (2, 150), generator=torch.Generator().manual_seed(0)
)  # beyond the base models' 128 positions


def ended(workshop, name):
    """The folder of the twin's run, with what it begins with run before it."""
    if name == "llama2-7b-yarn-128k":
        workshop.tiny("llama2-7b-yarn-64k")
    if name == "llama2-7b-longrope-128k" and name not in workshop.ended:
        arguments = "search runs/tiny/base-llama/model --target 512 --data stdlib --data-split held_out --blocks --max-documents 1"
        arguments += (
            " --population 4 --iterations 1 --mutations 1 --crossovers 1 --parents 2 --out runs/tiny/longrope-search"
        )
        searched = workshop.hfpos(*arguments.split(), "--save", "runs/tiny/longrope-search/model")
        assert searched.code == 0, searched.error
    return workshop.tiny(name)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call
def test_a_tiny_twin_trains_and_loads(workshop, monkeypatch, name):
    folder = ended(workshop, name)
    monkeypatch.chdir(workshop.folder)  # adapters name their base model as the recipe does
    found = results(folder)
    measured = [value for each in found["evaluations"] for value in each.values()] + list(found["after"].values())
    assert all(map(math.isfinite, [found["train"]["train_loss"], *measured]))
    assert {each["step"] for each in found["evaluations"]} == {0, 2}
    assert "perplexity_at_512" in found["after"]
    model = hfpos.from_pretrained(folder / "model")
    scheme = describe(model).scheme
    assert scheme in workshop.ended[name].out or scheme == "longrope"
    here = logits(model)
    assert torch.isfinite(here).all()
    if name in STOCK:
        plain = AutoModelForCausalLM.from_pretrained(folder / "model")
        torch.testing.assert_close(logits(plain), here)
    if name not in ADAPTERS:  # what was trained, and not what it began with, is in the folder
        begun = load_file(next((workshop.folder / begins_with(name)).glob("*.safetensors")))
        saved = load_file(next((folder / "model").glob("*.safetensors")))
        assert any(not torch.equal(saved[key], weight) for key, weight in begun.items() if key in saved)


def begins_with(name):
    if name == "llama2-7b-longrope-128k":
        return "runs/tiny/longrope-search/model"
    family = next((each for each in ("gpt2", "bloom") if name.startswith(each)), "llama")
    return f"runs/tiny/base-{family}/model"


@pytest.mark.parametrize("name", sorted(ADAPTERS))
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_has_its_scheme_and_what_was_trained_beside_it(workshop, monkeypatch, name):
    monkeypatch.chdir(workshop.folder)
    folder = ended(workshop, name) / "model"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["hfpos"]["scheme"] == ("linear" if "longlora" in name else "yarn")
    weights = load_file(folder / "adapter_model.safetensors")
    kinds = {
        word: [key for key in weights if word in key]
        for word in ("embed_tokens", "layernorm", "norm.weight", "lora_B")
    }
    assert all(kinds.values()) if "qlora" not in name else {key for key, found in kinds.items() if found} == {"lora_B"}
    assert any(weights[key].abs().max() > 0 for key in kinds["lora_B"])
    model = hfpos.from_pretrained(folder)
    before = logits(model)
    if "qlora" in name:  # merged into 4-bit weights it is rounded
        return
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=1e-5, atol=1e-5)


def test_shifted_attention_is_of_training_alone(workshop, monkeypatch, tmp_path):
    folder = ended(workshop, "llama2-7b-longlora-32k")
    monkeypatch.chdir(workshop.folder)
    options = "--data stdlib --data-split held_out --lengths 128,512 --blocks --max-documents 2 --out"
    measured = workshop.hfpos("eval", "ppl", folder / "model", *options.split(), tmp_path / "found.json")
    assert measured.code == 0, measured.error
    found = load(tmp_path / "found.json").comparisons[0].runs[0].perplexity.by_length
    for length in (128, 512):
        assert found[length].perplexity == pytest.approx(results(folder)["after"][f"perplexity_at_{length}"], rel=1e-5)
