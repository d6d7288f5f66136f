"""What a saved patched model is to hfpos, and to a Transformers that has never heard of hfpos."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

import hfpos
from tests.pairs import PAIRS, Pair, tokens, unpatched
from tests.state import logits


FACTOR = {"factor": 4.0}
SAVED = [pair for pair in PAIRS if pair.model_type in ("llama", "gpt2", "bloom", "gemma3_text")] + [
    Pair("gemma3_text", "yarn", FACTOR | {"truncate": False}),
    Pair("llama", "yarn", FACTOR | {"truncate": False}),
    Pair("llama", "yarn", FACTOR | {"beta_fast": 16.0, "mscale": 0.7, "mscale_all_dim": 1.0}),
    Pair("llama", "llama3", FACTOR | {"low_freq_factor": 2.0}),
    Pair("gpt_neox", "yarn", FACTOR),
    Pair("gpt_neox", "partial"),
    Pair("phi", "linear", FACTOR),
    Pair("glm", "ntk", FACTOR),
    Pair("phi3", "linear", FACTOR),
    Pair("phi3", "yarn", FACTOR),
    Pair("bloom", "alibi", {"slopes": [0.5, 0.4, 0.3, 0.2]}),
]
STATIC = {"rope", "linear", "ntk", "ntk_by_parts", "yarn", "llama3", "abf", "partial"}
LENGTH = 60


def expected_to_be_stock(pair):
    """What the README promises: a RoPE with one set of frequencies, on a model whose own RoPE can say so, and resized tables."""
    if pair.model_type in ("gpt2", "bloom"):
        return pair.scheme == "learned"
    if pair.model_type == "gemma3_text" and pair.parameters.get("truncate") is False:
        return False  # Transformers 5.23 does not look at it where parameters are nested
    if (pair.model_type, pair.scheme) in (("gpt_neox", "partial"), ("phi3", "yarn")):
        return False
    pinned = pair.parameters.get("cache") == "pinned" and "factor" in pair.parameters
    return pair.scheme in STATIC or pinned


def phi3_length(pair):
    return {"original_max_position_embeddings": 32} if pair.model_type == "phi3" else {}


def build(pair):
    return pair.model(**phi3_length(pair))


LOAD_WITHOUT_HFPOS = """
import json, sys
from pathlib import Path
import torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ids, results = torch.load(sys.argv[1] + "/ids.pt"), {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    if not folder.is_dir():
        continue
    found = results[folder.name] = {}
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    for loader in ("AutoModelForCausalLM", "AutoModel", name):
        try:
            model = getattr(transformers, loader).from_pretrained(folder).eval()
            if loader == "AutoModelForCausalLM":
                with torch.no_grad():
                    torch.save(model(ids).logits, folder / "stock.pt")
            found[loader] = "loaded"
        except Exception as error:
            found[loader] = f"{type(error).__name__}: {error}"
    try:
        transformers.AutoConfig.from_pretrained(folder)
        found["AutoConfig"] = "loaded"
    except Exception as error:
        found["AutoConfig"] = f"{type(error).__name__}: {error}"
assert not [name for name in sys.modules if name.split(".")[0] == "hfpos"]
(Path(sys.argv[1]) / "results.json").write_text(json.dumps(results))
"""


def test_stock_transformers_loads_it_equal_or_says_hfpos(tmp_path):
    expected, ids = {}, tokens(2, LENGTH)
    torch.save(ids, tmp_path / "ids.pt")
    for number, pair in enumerate(SAVED):
        model = build(pair)
        folder = tmp_path / f"{number:03d}"
        model.save_pretrained(folder)
        expected[folder.name] = pair, hfpos.describe(model).stock_loadable, logits(model, LENGTH)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD_WITHOUT_HFPOS, str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    wrong = []
    for name, (pair, stock, reference) in expected.items():
        loaded = {loader for loader, result in results[name].items() if result == "loaded"}
        if stock != expected_to_be_stock(pair):
            wrong.append(f"{pair}: stock_loadable is {stock}")
        if stock and (len(loaded) < 4 or not torch.allclose(torch.load(tmp_path / name / "stock.pt"), reference, rtol=0, atol=1e-6)):
            wrong.append(f"{pair}: {results[name]}")
        if not stock and (loaded or not all("hfpos" in result for result in results[name].values())):
            wrong.append(f"{pair}: {results[name]}")
    assert not wrong, "\n".join(wrong)
