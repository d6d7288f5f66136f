"""What a saved patched model is to hfpos, and to a Transformers that has never heard of hfpos."""

import json
import os
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

import hfpos
from hfpos.checkpoint import load_skeleton, load_tokenizer
from tests.pairs import OWN_ATTENTION, PAIRS, Pair, tokens, unpatched
from tests.state import logits


FACTOR = {"factor": 4.0}
SAVED = [pair for pair in PAIRS if pair.model_type in ("llama", "gpt2", "gemma3_text", *OWN_ATTENTION)] + [
    Pair("gemma3_text", "yarn", FACTOR | {"beta_slow": 0.1, "truncate": False}),
    Pair("llama", "yarn", FACTOR | {"beta_slow": 0.1, "truncate": False}),
    Pair("llama", "yarn", FACTOR | {"beta_fast": 16.0, "mscale": 0.7, "mscale_all_dim": 1.0}),
    Pair("llama", "llama3", FACTOR | {"low_freq_factor": 2.0}),
    Pair("gpt_neox", "yarn", FACTOR),
    Pair("gpt_neox", "partial"),
    Pair("phi", "linear", FACTOR),
    Pair("glm", "ntk", FACTOR),
    Pair("phi3", "linear", FACTOR),
    Pair("phi3", "yarn", FACTOR),
    Pair("phi3", "llama3", FACTOR),
    Pair("phi3", "ntk", FACTOR),
    Pair("phi3", "partial"),
    Pair("phi3", "dynamic_yarn", FACTOR | {"cache": "pinned"}),
    Pair("bloom", "alibi", {"slopes": [0.5, 0.4, 0.3, 0.2]}),
]
# of those that only hfpos loads, enough for the one process without it
SEEN_BY_STOCK = [
    pair
    for pair in SAVED
    if pair.model_type not in ("gpt2", *OWN_ATTENTION) or pair.scheme in ("yarn", "alibi", "nope", "learned")
]
STATIC = {"rope", "linear", "ntk", "ntk_by_parts", "yarn", "llama3", "abf", "partial"}
LENGTH = 60


def expected_to_be_stock(pair):
    """What the README promises: a RoPE with one set of frequencies, on a model whose own RoPE can say so, and resized tables."""
    if pair.model_type in ("gpt2", *OWN_ATTENTION):
        return pair.scheme == "learned"
    if pair.model_type == "gemma3_text" and pair.parameters.get("truncate") is False:
        return False  # Transformers 5.23 does not look at it where parameters are nested
    if pair.scheme == "partial" and pair.model_type in ("gpt_neox", "phi3"):
        return False  # the one has a fraction of its own, the other's config takes nothing but longrope
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
    for number, pair in enumerate(SEEN_BY_STOCK):
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
            wrong.append(f"{pair}: hfpos says that stock_loadable is {stock}")
        if stock and (len(loaded) < 4 or not torch.equal(torch.load(tmp_path / name / "stock.pt"), reference)):
            wrong.append(f"{pair}: {results[name]}")
        if not stock and (loaded or not all("hfpos" in result for result in results[name].values())):
            wrong.append(f"{pair}: {results[name]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("pair", SAVED, ids=str)
def test_hfpos_loads_it_equal(pair, tmp_path):
    model = build(pair)
    model.save_pretrained(tmp_path)
    again = hfpos.from_pretrained(tmp_path)
    assert torch.equal(logits(again, LENGTH), logits(model, LENGTH))
    assert again.config.to_dict().keys() == model.config.to_dict().keys()
    if pair.scheme == "learned":
        assert not hfpos.describe(again).patched  # a stock model with a longer table
        return
    first, second = hfpos.describe(model), hfpos.describe(again)
    assert (second.scheme, second.parameters, second.patched) == (first.scheme, first.parameters, True)
    assert second.wavelengths == first.wavelengths
    hfpos.unpatch(again)
    stock = pair.unpatched(**phi3_length(pair))
    assert torch.equal(logits(again), logits(stock))
    assert not hasattr(again.config, "hfpos")
    ignored = ("_name_or_path", "architectures", "dtype", "attn_config")
    base, saved = stock.config.to_dict(), again.config.to_dict()
    assert {key: saved[key] for key in saved if key not in ignored} == {
        key: base[key] for key in base if key not in ignored
    }


WAYS = [
    Pair("llama", "yarn", FACTOR),
    Pair("llama", "dynamic", FACTOR),
    Pair("llama", "alibi"),
    Pair("gpt2", "yarn", FACTOR),
    Pair("gpt2", "learned", {"target_length": 64}),
    Pair("bloom", "alibi", FACTOR),
    Pair("falcon", "alibi", FACTOR),
    Pair("mpt", "alibi", FACTOR),
    Pair("gemma3_text", "yarn", FACTOR),
]


@pytest.mark.parametrize("pair", WAYS, ids=str)
def test_sharded(pair, tmp_path):
    model = pair.model()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(hfpos.from_pretrained(tmp_path), LENGTH), logits(model, LENGTH))


@pytest.mark.parametrize("pair", WAYS, ids=str)
def test_arguments_of_transformers(pair, tmp_path):
    model = pair.model()
    model.save_pretrained(tmp_path)
    loaded = hfpos.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"}, attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16
    backend = loaded.config._attn_implementation.removeprefix("hfpos_")
    assert backend == ("sdpa" if pair.model_type in ("bloom", "mpt") else "eager")  # eager is all that stock BLOOM has
    error = logits(loaded, LENGTH).float() - logits(model, LENGTH)
    assert error.norm() < 0.04 * logits(model, LENGTH).norm()


@pytest.mark.parametrize("pair", WAYS, ids=str)
def test_dtype_of_the_checkpoint_is_kept(pair, tmp_path):
    model = pair.model().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = hfpos.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, LENGTH), logits(model, LENGTH))


@pytest.mark.parametrize("pair", WAYS, ids=str)
def test_saved_again_and_after_more_training(pair, tmp_path):
    model = pair.model()
    model.save_pretrained(tmp_path / "first")
    again = hfpos.from_pretrained(tmp_path / "first").train()
    optimizer = torch.optim.SGD([weight for weight in again.parameters() if weight.requires_grad], lr=0.1)
    again(tokens(2, LENGTH), labels=tokens(2, LENGTH)).loss.backward()
    optimizer.step()
    again.eval().save_pretrained(tmp_path / "second")
    assert torch.equal(logits(hfpos.from_pretrained(tmp_path / "second"), LENGTH), logits(again, LENGTH))
    assert not torch.equal(logits(again, LENGTH), logits(model, LENGTH))


def test_unpatched_folder(tmp_path):
    model = unpatched("llama")
    model.save_pretrained(tmp_path)
    loaded = hfpos.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not hfpos.describe(loaded).patched


def test_unpatched_before_it_is_saved(tmp_path):
    for pair in WAYS:
        hfpos.unpatch(pair.model()).save_pretrained(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
        assert "hfpos" not in json.dumps(values)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(loaded), logits(pair.unpatched()))


def test_scheme_changed_before_it_is_saved(tmp_path):
    model = hfpos.patch(Pair("llama", "alibi").model(), "yarn", **FACTOR)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, LENGTH), logits(model, LENGTH))


def test_decoder_without_a_head(tmp_path):
    for pair in WAYS:
        bare = hfpos.patch(pair.unpatched().base_model, pair.scheme, **pair.parameters)
        bare.save_pretrained(tmp_path)
        loaded = hfpos.from_pretrained(tmp_path)
        with torch.no_grad():
            found, expected = (decoder(tokens(2, LENGTH)).last_hidden_state for decoder in (loaded, bare))
        assert torch.equal(found, expected)


# Limits that follow the patched length


def tokenizer_of(length):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length)


@pytest.mark.parametrize(
    ("pair", "length", "key"),
    [
        (Pair("llama", "yarn", {"target_length": 100}), 100, "max_position_embeddings"),
        (Pair("llama", "linear", {"factor": 4}), 128, "max_position_embeddings"),
        (Pair("llama", "dynamic", {"factor": 4}), 128, "max_position_embeddings"),
        (Pair("llama", "abf", {"target_length": 96}), 96, "max_position_embeddings"),
        (Pair("gpt2", "learned", {"target_length": 48}), 48, "n_positions"),
        (Pair("gpt2", "yarn", {"factor": 2}), 64, "n_positions"),
        (Pair("bloom", "alibi", {"factor": 2}), 64, "seq_length"),
    ],
    ids=str,
)
def test_limits_follow(pair, length, key, tmp_path):
    model, tokenizer = pair.unpatched(), tokenizer_of(32)
    model.generation_config.max_length = 32
    generation = model.generation_config
    hfpos.patch(model, pair.scheme, tokenizer=tokenizer, **pair.parameters)
    assert getattr(model.config, key) == length
    assert model.generation_config.max_length == length
    assert tokenizer.model_max_length == length
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).model_max_length == length
    again = hfpos.from_pretrained(tmp_path)
    assert getattr(again.config, key) == length
    assert again.generation_config.max_length == length
    hfpos.unpatch(model)
    assert getattr(model.config, key) == 32
    assert (model.generation_config, model.generation_config.max_length) == (generation, 32)
    assert tokenizer.model_max_length == 32
    if pair.scheme != "learned":
        assert getattr(hfpos.unpatch(again).config, key) == 32


def test_other_limits_stay():
    model, tokenizer = unpatched("llama"), tokenizer_of(32)
    model.generation_config.max_length = 20
    hfpos.patch(model, "yarn", **FACTOR)
    assert model.generation_config.max_length == 20
    assert tokenizer.model_max_length == 32
    with hfpos.patched(model, "nope", tokenizer=tokenizer):
        assert tokenizer.model_max_length == 32
        assert model.config.max_position_embeddings == 32


def test_tokenizer_of_a_folder_that_only_hfpos_loads(tmp_path):
    Pair("llama", "alibi").model().save_pretrained(tmp_path)
    tokenizer_of(77).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 77
    assert tokenizer("b a").input_ids == [1, 0]


# Damage


@pytest.fixture
def folder(tmp_path):
    """A saved model that only hfpos loads, to be damaged."""
    Pair("llama", "dynamic", FACTOR).model().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def changed_block(folder, **changes):
    return {"hfpos": json.loads((folder / "config.json").read_text())["hfpos"] | changes}


def refused(folder, message, **arguments):
    with pytest.raises(hfpos.PatchError, match=message):
        hfpos.from_pretrained(folder, **arguments)


def test_no_folder(tmp_path, monkeypatch):
    refused(tmp_path / "nothing", r"nothing is not a folder; expected the folder of a saved model, or a hub name")
    refused("./nothing", "nothing is not a folder")
    neither = r"holds neither config\.json nor adapter_config\.json; expected the folder of a saved model, or a hub name that can be"
    refused("no-such-organisation/no-such-model", neither)
    refused(tmp_path, neither)
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file is not a folder")


@pytest.mark.parametrize("text", ["{", "", "[1]", "null", "\x00"])
def test_config_that_is_not_one(folder, text):
    (folder / "config.json").write_text(text)
    refused(
        folder,
        r"config\.json (is not readable as JSON|holds a (list|NoneType), expected an object).*the checkpoint is damaged",
    )


@pytest.mark.parametrize(
    "block", [None, 1, "dynamic", {}, {"scheme": "dynamic"}, {"scheme": "dynamic", "parameters": {}}]
)
def test_block_that_is_damaged(folder, block):
    rewrite(folder, hfpos=block)
    refused(folder, r"'hfpos' block of .* is damaged: .*; expected scheme, parameters and base")


def test_block_of_another_version(folder):
    rewrite(folder, **changed_block(folder, scheme="dinamic"))
    refused(folder, "unknown scheme 'dinamic': did you mean 'dynamic'")
    rewrite(folder, **changed_block(folder, scheme="dynamic", parameters={"factr": 4}))
    refused(folder, "'dynamic' has no parameter 'factr': did you mean 'factor'")
    rewrite(folder, **changed_block(folder, scheme="dynamic", parameters={"factor": -4}))
    refused(folder, "dynamic: factor=-4 is not usable")


@pytest.mark.parametrize("values", [{"parameters": 3}, {"base": 3}, {"parameters": None}, {"scheme": ["dynamic"]}])
def test_block_of_wrong_types(folder, values):
    rewrite(folder, **changed_block(folder, **values))
    refused(folder, r"'hfpos' block of .* is damaged: ")


def test_unknown_model_type(folder):
    block = changed_block(folder)["hfpos"]
    rewrite(folder, hfpos=block | {"own_model_type": "lama"})
    refused(folder, "is of model type 'lama', which this version of Transformers does not have")


def test_unknown_rope_type(tmp_path):
    unpatched("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, rope_parameters={"rope_type": "yaarn", "rope_theta": 1e4})
    message = "its config names 'yaarn', which this version of Transformers does not have"
    refused(tmp_path, f"cannot load the weights in .*: {message}")
    with pytest.raises(hfpos.PatchError, match=f"the config in .* does not make a model: {message}"):
        load_skeleton(tmp_path)


def test_weights_that_are_missing(folder):
    path = folder / "model.safetensors"
    weights = path.read_bytes()
    path.unlink()
    refused(folder, "cannot load the weights in ")
    path.write_bytes(weights[: len(weights) // 2])
    refused(folder, "cannot load the weights in ")


def test_weights_that_lack_some(tmp_path):
    from safetensors.torch import load_file, save_file

    for pair in (Pair("llama", "dynamic", FACTOR), Pair("llama", "yarn", FACTOR)):
        pair.model().save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        weights = load_file(path)
        del weights["model.layers.0.self_attn.q_proj.weight"]
        save_file(weights, path, metadata={"format": "pt"})
        refused(tmp_path, r"lacks 1 weights \(model\.layers\.0\.self_attn\.q_proj\.weight\); they would be random")


def test_shard_that_is_missing(tmp_path):
    Pair("llama", "dynamic", FACTOR).model().save_pretrained(tmp_path, max_shard_size="60KB")
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    refused(tmp_path, "cannot load the weights in ")


def test_config_cannot_be_given(folder):
    refused(folder, "config= cannot be given", config=transformers.LlamaConfig())


def test_the_guard_is_in_the_file_only(tmp_path):
    model = Pair("llama", "alibi").model()
    assert model.config.model_type == "llama"
    assert isinstance(model.config, transformers.LlamaConfig)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "hfpos"
    assert values["hfpos"]["own_model_type"] == "llama"
    assert model.config.to_dict()["model_type"] == "llama"
    assert model.config.dtype != "hfpos_from_pretrained"
    again = type(model.config).from_pretrained(tmp_path)
    assert (again.model_type, again.max_position_embeddings) == ("llama", 32)


def test_numbers_at_their_defaults_come_back(tmp_path):
    """Transformers writes only what differs from the defaults; what the guard puts a text in the place of may be such a number."""
    config = transformers.LlamaConfig(
        vocab_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    assert config.hidden_size == 4096
    model = hfpos.patch(transformers.LlamaForCausalLM(config).eval(), "alibi")
    model.save_pretrained(tmp_path)
    loaded = hfpos.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert "own_" not in json.dumps(loaded.config.to_dict())
    with pytest.raises(StrictDataclassError, match="hfpos"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_part_of_a_composite_model(tmp_path):
    """The decoder's own class finds its config inside that of the whole model."""
    model = hfpos.patch(unpatched("gemma3"), "alibi")
    model.save_pretrained(tmp_path)
    for name in ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration", "AutoModel", "AutoModelForCausalLM"):
        with pytest.raises((ValueError, StrictDataclassError), match="hfpos"):
            getattr(transformers, name).from_pretrained(tmp_path)
    loaded = hfpos.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, LENGTH), logits(model, LENGTH))
    stock = unpatched("gemma3")
    assert torch.equal(logits(hfpos.unpatch(loaded)), logits(stock))
    found, expected = (each.config.text_config.to_dict() | {"dtype": None} for each in (loaded, stock))
    assert found == expected


# What the command line looks at without loading weights


def test_skeleton(tmp_path):
    for number, pair in enumerate(WAYS):
        model = pair.model()
        model.save_pretrained(tmp_path / f"{number}")
        skeleton = load_skeleton(tmp_path / f"{number}")
        assert all(weight.is_meta for weight in skeleton.parameters())
        found, expected = hfpos.describe(skeleton), hfpos.describe(model)
        if pair.scheme == "learned":
            assert (found.patched, found.trained_length) == (False, 64)
        else:
            assert (found.scheme, found.parameters, found.wavelengths) == (
                pair.scheme,
                expected.parameters,
                expected.wavelengths,
            )
    unpatched("gpt2").save_pretrained(tmp_path / "plain")
    assert not hfpos.describe(load_skeleton(tmp_path / "plain")).patched
    with pytest.raises(hfpos.PatchError, match="nothing is not a folder"):
        load_skeleton(tmp_path / "nothing")
    rewrite(tmp_path / "plain", n_head=7)
    with pytest.raises(hfpos.PatchError, match=r"the config in .* does not make a model: ValueError: "):
        load_skeleton(tmp_path / "plain")


def test_tokenizer_if_there_is_one(tmp_path):
    assert load_tokenizer(tmp_path) is None
    tokenizer_of(77).save_pretrained(tmp_path)
    Pair("llama", "alibi").model().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).model_max_length == 77
