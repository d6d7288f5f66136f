"""lm-evaluation-harness runs patched models: same numbers as our own scoring, every argument used, patched length."""

import dataclasses
import importlib.util
import inspect
import json
import sys

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model

import hfpos
from hfpos import PatchError
from hfpos.data import load_documents, train_tokenizer
from hfpos.evaluate import harness
from hfpos.evaluate.harness import HfposLM, main
from hfpos.schemes import REGISTRY
from tests.tiny import tiny


TEXTS = [" ".join(f"{word}{number * step}" for number in range(40)) for step, word in enumerate(("a", "be", "sea"), 3)]
TASK = """
task: own_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A model trained at 64 tokens, its tokenizer, and a task over texts that are longer."""
    folder = tmp_path_factory.mktemp("harness")
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "own_texts.yaml").write_text(TASK.format(folder=folder))
    return folder


def harness_bits(folder, **model_args):
    """Bits per byte of the task, measured by the harness."""
    results = lm_eval.simple_evaluate(
        model="hfpos",
        model_args={"pretrained": str(folder / "model"), **model_args},
        device="cpu",
        tasks=["own_texts"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    return results["results"]["own_texts"]["bits_per_byte,none"]


def own_bits(model, tokenizer, tmp_path):
    """The same by `hfpos.evaluate.perplexity`, BOS in front."""
    documents = load_documents(TEXTS, tokenizer, cache_dir=tmp_path).documents
    bits = 0.0
    for document in documents:
        length = len(document.ids) + 1
        assert 64 < length <= 256
        score = hfpos.evaluate.perplexity(
            model, [document], [length], bos="every-window", bos_token_id=tokenizer.bos_token_id
        ).by_length[length]
        bits += score.bits_per_byte * len(TEXTS[documents.index(document)].encode())
    return bits / sum(len(text.encode()) for text in TEXTS)


def load(folder, **model_args):
    return HfposLM(str(folder / "model"), device="cpu", **model_args)


def test_the_command_line_measures_the_patched_model(folder, tokenizer, tmp_path, capsys):
    before = list(sys.argv)
    main(
        [
            *("--model", "hfpos", "--model_args", f"pretrained={folder / 'model'},scheme=yarn,factor=4"),
            *(
                "--tasks",
                "own_texts",
                "--include_path",
                str(folder),
                "--device",
                "cpu",
                "--output_path",
                str(tmp_path),
            ),
        ]
    )
    assert sys.argv == before
    assert "bits_per_byte" in capsys.readouterr().out
    (written,) = tmp_path.rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["own_texts"]["bits_per_byte,none"]
    model = hfpos.from_pretrained(folder / "model")
    unpatched = own_bits(model, tokenizer, tmp_path)
    patched = own_bits(hfpos.patch(model, "yarn", factor=4), tokenizer, tmp_path)
    assert found == pytest.approx(patched, rel=1e-6)
    assert abs(found - unpatched) > 1e-3


def test_a_saved_scheme_comes_back(folder, tokenizer, tmp_path):
    model = hfpos.patch(hfpos.from_pretrained(folder / "model"), "alibi")
    assert not hfpos.describe(model).stock_loadable
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name in ("data.jsonl", "own_texts.yaml"):
        (tmp_path / name).write_text((folder / name).read_text())
    options = {"max_length": 256}
    saved = harness_bits(tmp_path, **options)
    assert saved == pytest.approx(own_bits(model, tokenizer, tmp_path), rel=1e-6)
    assert saved == harness_bits(folder, scheme="alibi", **options) != harness_bits(folder, **options)
    assert hfpos.describe(load(tmp_path, scheme="nope").model).scheme == "nope"  # instead of the saved one


@pytest.mark.parametrize(
    ("model_args", "length"),
    [
        ({}, 64),
        ({"scheme": "yarn", "factor": 4}, 256),
        ({"scheme": "dynamic", "target_length": 192}, 192),
        ({"scheme": "yarn", "factor": 4, "max_length": 100}, 100),
    ],
)
def test_max_length(folder, model_args, length):
    model = load(folder, **model_args)
    assert model.max_length == length
    described = hfpos.describe(model.model)
    assert described.scheme == model_args.get("scheme", "rope")
    assert described.patched_length == (256 if "factor" in model_args else length)


def test_the_length_of_a_family_that_hfpos_does_not_know(folder, tokenizer, tmp_path):
    tiny("mamba", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert load(tmp_path).max_length == HFLM._DEFAULT_MAX_LENGTH
    with pytest.raises(PatchError, match="fits no family"):
        load(tmp_path, scheme="yarn", factor=4)


def test_every_argument_arrives(folder):
    model = load(folder, scheme="yarn", factor=2, beta_fast=16, dtype="bfloat16", batch_size=3)
    parameters = hfpos.describe(model.model).parameters
    assert (parameters["factor"], parameters["beta_fast"]) == (2, 16)
    assert (model.model.dtype, model.batch_size) == (torch.bfloat16, 3)
    assert load(folder, attn_implementation="eager").model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"scheme": "yarm", "factor": 4}, "did you mean 'yarn'"),
        ({"scheme": "yarn", "factr": 4, "factor": 2}, "unexpected keyword argument 'factr'"),
        ({"scheme": "yarn", "factor": 2, "slopes": [1]}, "unexpected keyword argument 'slopes'"),
        ({"factor": 4}, "unexpected keyword argument 'factor'"),
        ({"scheme": "yarn"}, "how far to extend is not given"),
        ({"scheme": "yarn", "factor": "four"}, "factor='four'"),
        ({"peft": "x", "revision": "y"}, "peft=x was given with delta= or revision="),
    ],
)
def test_no_argument_is_dropped(folder, model_args, message):
    with pytest.raises(PatchError, match=message):
        load(folder, **model_args)


def test_a_model_instead_of_a_path(folder, tokenizer):
    model = hfpos.from_pretrained(folder / "model")
    assert HfposLM(model, scheme="yarn", factor=4, tokenizer=tokenizer).max_length == 256
    assert hfpos.describe(model).scheme == "yarn"
    with pytest.raises(PatchError, match="factr: neither"):
        HfposLM(model, scheme="yarn", factor=4, factr=2, tokenizer=tokenizer)


def test_no_parameter_of_a_scheme_hides_one_of_the_harness():
    taken = inspect.signature(HFLM.__init__).parameters
    for name, scheme in REGISTRY.as_dict().items():
        assert not {field.name for field in dataclasses.fields(scheme)} & taken.keys(), name


# PEFT asks for a name that Transformers renames
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_brings_its_scheme(folder, tmp_path):
    model = hfpos.patch(hfpos.from_pretrained(folder / "model"), "yarn", factor=4)
    adapter = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path)
    loaded = load(folder, peft=str(tmp_path))
    assert loaded.max_length == 256
    ids = torch.arange(100)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, adapter.eval()(ids).logits)


def test_without_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)  # as if it were not installed
    spec = importlib.util.spec_from_file_location("harness_alone", harness.__file__)
    with pytest.raises(PatchError, match=r'cannot be imported .*pip install "hfpos\[lm-eval\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
