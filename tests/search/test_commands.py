"""`hfpos search` as a user runs it: what is printed and written, and that stock Transformers loads what it saves."""

import json

import pytest
import torch
import typer
from pydantic import TypeAdapter
from pydantic_core import to_json
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfpos
from hfpos import PatchError
from hfpos.data import train_tokenizer
from hfpos.evaluate import perplexity
from hfpos.search import SearchRecord
from hfpos.search.commands import add_to
from tests.tiny import tiny


TEXTS = [" ".join(f"{i} times {j} is {i * j}." for i in range(150)) for j in range(3)]
SMALL = ["--population", 5, "--iterations", 1, "--mutations", 2, "--crossovers", 1, "--parents", 2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a model and its tokenizer, and one with text."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tiny("llama", vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder / "model", folder / "text", tokenizer


def run(*arguments):
    """`hfpos search ARGUMENTS`, errors and all."""
    app = typer.Typer()
    app.callback()(lambda: None)  # else the only command needs no name
    add_to(app)
    app(["search", *map(str, arguments)], standalone_mode=False)


def test_what_it_writes_is_what_it_measured_and_loads_in_stock_transformers(source, capsys, tmp_path):
    model, text, tokenizer = source
    out, saved = tmp_path / "out", tmp_path / "saved"
    arguments = [model, "--target", 256, "--data", text, "--blocks", "--max-documents", 3, *SMALL]
    run(*arguments, "--out", out, "--save", saved, "--dtype", "float32")
    printed = capsys.readouterr().out
    record = json.loads((out / "search.json").read_text(encoding="utf-8"))
    assert json.loads(to_json(TypeAdapter(SearchRecord).validate_python(record), inf_nan_mode="strings")) == record
    result = record["result"]
    for kind in ("unpatched", "pi", "ntk", "yarn", "best"):
        assert f"{result['perplexity'][kind]['256']:.4g}" in printed
        assert f"{result['perplexity'][kind]['64']:.4g}" in printed
    assert "stock Transformers loads it" in printed
    assert record["model"] == str(model)
    assert record["data"]["sha256"] == result["data_sha256"]
    assert record["data"]["preparation"] == {"block_tokens": 256, "max_documents": 3}
    assert record["provenance"]["versions"]["hfpos"] == hfpos.__version__

    scheme = json.loads((out / "longrope.json").read_text(encoding="utf-8"))
    assert scheme.pop("name") == "longrope"
    patched = hfpos.patch(hfpos.from_pretrained(model), "longrope", **scheme)
    blocks = [
        ids[i : i + 256] for ids in (tokenizer(each).input_ids for each in TEXTS) for i in range(0, len(ids), 256)
    ]
    found = perplexity(patched, [block for block in blocks if len(block) == 256][:3], [256]).by_length[256]
    assert found.perplexity == pytest.approx(result["perplexity"]["best"]["256"], rel=1e-9)

    stock = AutoModelForCausalLM.from_pretrained(saved)
    assert stock.config.rope_parameters["rope_type"] == "longrope"
    assert stock.config.max_position_embeddings == AutoTokenizer.from_pretrained(saved).model_max_length == 256
    for length in (30, 64, 65, 256):
        ids = torch.tensor([blocks[0][:length]])
        with torch.no_grad():
            torch.testing.assert_close(stock(ids).logits, patched(ids).logits, rtol=0, atol=0)

    # the same again goes by its journal, and says the same
    before = (out / "candidates.jsonl").read_bytes()
    run(*arguments, "--out", out, "--dtype", "float32")
    assert (out / "candidates.jsonl").read_bytes() == before
    assert capsys.readouterr().out.splitlines()[:10] == printed.splitlines()[:10]
    with pytest.raises(PatchError, match="is of another search: data"):
        run(*arguments, "--data-seed", 5, "--max-documents", 2, "--out", out, "--dtype", "float32")


def test_every_option_reaches_the_search(monkeypatch, source, tmp_path):
    given = {}

    def search(model, documents, target, **arguments):
        given.update(
            arguments, dtype=model.dtype, sizes=[len(document.ids) for document in documents.documents], target=target
        )
        raise PatchError("enough")

    monkeypatch.setattr("hfpos.search.search", search)
    options = ["--original-length", "64", "--attention-factor", 1.5, "--population", 9, "--iterations", 8]
    options += ["--mutations", 7, "--crossovers", 6, "--parents", 5, "--mutation-probability", 0.4, "--seed", 3]
    options += ["--bos", "first", "--bos-token-id", 2, "--batch-size", 4, "--chunk", 99, "--dtype", "bfloat16"]
    with pytest.raises(PatchError, match="enough"):
        run(source[0], "--target", "1k", "--data", source[1], "--blocks", *options, "--out", tmp_path)
    assert given == {
        "original_length": 64,
        "attention_factor": 1.5,
        "population": 9,
        "iterations": 8,
        "mutations": 7,
        "crossovers": 6,
        "parents": 5,
        "mutation_probability": 0.4,
        "seed": 3,
        "bos": "first",
        "bos_token_id": 2,
        "batch_size": 4,
        "chunk": 99,
        "resume": tmp_path,
        "progress": True,
        "dtype": torch.bfloat16,
        "sizes": [1023] * len(given["sizes"]),
        "target": 1024,
    }


def test_bad_use_is_said_before_anything_is_measured(source, tmp_path):
    model, text, _ = source
    (tmp_path / "short.txt").write_text("1 times 1 is 1.", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases = [
        (["--target", "1x"], "'1x' is not a number of tokens"),
        (["--target", "1k,2k"], "is 2 lengths; expected one"),
        (["--target", "64"], "target_length=64 is not beyond the original length 64"),
        (
            ["--target", "256", "--data", tmp_path / "short.txt"],
            r"short.txt has \d+ tokens, fewer than the target length 256",
        ),
        (["--target", "256", "--data", tmp_path / "none.txt"], "none.txt"),
        (["--target", "256", "--save", tmp_path / "full"], "full exists and is not an empty folder"),
        (["--target", "256", "--population", 0], "population=0"),
    ]
    for arguments, message in cases:
        data = [] if "--data" in arguments else ["--data", text]
        with pytest.raises(PatchError, match=message):
            run(model, *arguments, *data, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
