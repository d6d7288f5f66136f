"""The whole demo at toy size: what it measures, writes, keeps, and refuses."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import hfpos
from hfpos.data import tokenize, train_tokenizer
from hfpos.demo import BaseRecipe, DemoOptions, models, run
from hfpos.demo.findings import finetuned_findings, tuned, untrained_findings
from hfpos.demo.measure import held_out_pieces
from hfpos.evaluate import LengthScore, PerplexityResult, perplexity


TOY = BaseRecipe(vocab_size=300, hidden_size=32, layers=1, head_dim=32, context=16, steps=20)
LENGTHS = ["8", "16", "32", "64"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(10):
        words = " ".join(f"{i} times {number} is {i * number}." for i in range(120))
        (folder / f"{number}.txt").write_text(words, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def first(text, tmp_path_factory):
    options = DemoOptions(
        text=text,
        out=tmp_path_factory.mktemp("out"),
        base=TOY,
        finetune_steps=5,
        recall_steps=5,
        batch_tokens=128,
        eval_tokens=512,
    )
    return options, run(options)


def test_measures_every_scheme_at_every_length(first):
    options, results = first
    assert list(results["scores"]) == [
        "none",
        "linear",
        "ntk",
        "yarn",
        "self_extend",
        "alibi",
        "none, fine-tuned",
        tuned(results["best"]),
    ]
    for scores in results["scores"].values():
        assert list(scores) == LENGTHS
        assert all(score["documents"] == 8 for score in scores.values())
    longest = {name: results["scores"][name]["64"]["perplexity"] for name in ("linear", "ntk", "yarn")}
    assert longest[results["best"]] == min(longest.values())
    assert results["refused"] == {}


def test_writes_numbers_plot_and_loadable_models(first):
    options, results = first
    assert json.loads((options.out / "results.json").read_text(encoding="utf-8")) == results
    assert (options.out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert results["versions"]["hfpos"] == hfpos.__version__
    assert results["options"]["base"]["context"] == results["model"]["trained_length"] == 16
    assert {"base model", "measure", "fine-tune", "total"} <= results["seconds"].keys()
    folder = results["finetuned"][results["best"]]
    found = hfpos.describe(hfpos.from_pretrained(folder))
    assert (found.scheme, found.patched_length) == (results["best"], 64)
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 64


def test_recall_of_the_lengths_that_pairs_fit_into(first):
    recall = first[1]["recall"]
    assert list(recall) == ["none", "linear", "ntk", "yarn"]
    for result in recall.values():
        assert sorted({cell["length"] for cell in result["cells"]}) == [32, 64]
        assert result["chance"] == 1 / 8


def test_held_out_text_is_there_to_compare_on(first):
    options, results = first
    found = hfpos.data.read_documents(options.out / "held-out.jsonl")
    assert len(found) == len(results["text"]["held_out"])


def test_held_out_files_are_not_trained_on(first, text):
    options, results = first
    corpus = models.read_corpus(options)
    trained_on = {document.name for document in corpus.train}
    assert trained_on.isdisjoint(results["text"]["held_out"])
    assert trained_on.union(results["text"]["held_out"]) == {path.name for path in text.iterdir()}


def test_second_run_trains_nothing_and_finds_the_same(first, monkeypatch):
    options, results = first
    monkeypatch.setattr(models, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    again = run(options)
    assert again["scores"] == results["scores"]


def test_own_model_without_finetuning(first, text, tmp_path):
    base = first[1]["model"]["folder"]
    rows = [{"text": path.read_text(encoding="utf-8")} for path in sorted(text.iterdir())]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = DemoOptions(
        model=base, text=tmp_path / "text.jsonl", out=tmp_path / "out", factor=2, finetune=False, eval_tokens=512
    )
    results = run(options)
    assert list(results["scores"]) == ["none", "linear", "ntk", "yarn", "self_extend", "alibi"]
    assert list(results["scores"]["none"]) == LENGTHS[:3]
    assert results["finetuned"] == {}
    written = sorted(path.name for path in options.out.iterdir())
    assert written == ["held-out.jsonl", "perplexity.png", "results.json", "train.jsonl"]


def test_unpatched_row_is_the_stock_model(first):
    options, results = first
    model = AutoModelForCausalLM.from_pretrained(results["model"]["folder"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(results["model"]["folder"])
    documents = tokenize(tokenizer, models.read_corpus(options).held_out)
    pieces = held_out_pieces(options, documents, 64)
    for length in LENGTHS:
        score = perplexity(model, pieces, [int(length)]).by_length[int(length)]
        assert results["scores"]["none"][length]["nll"] == pytest.approx(score.nll, rel=1e-5)


def test_interrupted_training_leaves_no_half_model(first, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    options = DemoOptions(text=first[0].text, out=tmp_path, base=TOY)
    monkeypatch.setattr(models, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [".partial"]


@pytest.mark.parametrize("setting", [{"factor": 1}, {"factor": float("nan")}, {"eval_tokens": 0}, {"threads": 0}])
def test_bad_settings(setting):
    with pytest.raises(hfpos.PatchError, match=next(iter(setting))):
        DemoOptions(**setting)


def test_unusable_models_and_texts(first, text, tmp_path):
    (tmp_path / "short.txt").write_text("only this", encoding="utf-8")
    base = first[1]["model"]["folder"]
    with pytest.raises(hfpos.PatchError, match="no held-out document has 64 tokens"):
        run(DemoOptions(model=base, text=tmp_path / "short.txt", out=tmp_path / "out"))
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "bare")
    with pytest.raises(hfpos.PatchError, match="no tokenizer in"):
        run(DemoOptions(model=tmp_path / "bare", text=text, out=tmp_path / "out"))
    with pytest.raises(hfpos.PatchError, match="not a folder"):
        run(DemoOptions(model=tmp_path / "nowhere", text=text, out=tmp_path / "out"))
    tokenizer = train_tokenizer(["a b c"], vocab_size=259)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=16, n_embd=32, n_layer=1, n_head=1))
    gpt2.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(hfpos.PatchError, match="learned positions"):
        run(DemoOptions(model=tmp_path / "gpt2", text=text, out=tmp_path / "out"))


def test_training_is_seeded(first, tmp_path):
    options, results = first
    again = run(
        DemoOptions(text=options.text, out=tmp_path, base=TOY, finetune=False, batch_tokens=128, eval_tokens=512)
    )
    weights = [
        AutoModelForCausalLM.from_pretrained(found["model"]["folder"]).get_input_embeddings().weight
        for found in (results, again)
    ]
    torch.testing.assert_close(*weights)


def test_words_follow_the_numbers():
    def result(*values):
        scores = (LengthScore(perplexity=value, nll=0.0, tokens=1, documents=1) for value in values)
        return PerplexityResult(dict(zip((8, 16, 32), scores, strict=True)))

    scores = {"none": result(9, 8, 20), "yarn": result(9, 10, 10)}
    won = untrained_findings(scores, {"alibi": "no such seam"}, 16, "yarn")
    assert won[0] == "best scaling at 32: yarn, 20.00 -> 10.00 (-50.0 %) against the unpatched model"
    assert won[1].endswith("8.00 -> 10.00 (+25.0 %)")
    assert won[2] == "alibi does not fit this model: no such seam"
    grouped = untrained_findings(scores | {"self_extend": result(9, 8, 12)}, {}, 16, "yarn")
    assert grouped[2].startswith("self_extend at 32: 20.00 -> 12.00 (-40.0 %) against the unpatched model")
    lost = untrained_findings(scores | {"none": result(9, 8, 8)}, {}, 16, "yarn")
    scores |= {"none, fine-tuned": result(9, 8, 8), "yarn, fine-tuned": result(9, 8, 6)}
    after = finetuned_findings(scores, 16, "yarn")
    assert (
        after[2]
        == "the same training without a scheme reaches 8.00 at 32: the scheme itself is worth 8.00 -> 6.00 (-25.0 %)"
    )
    assert lost[0].startswith("at 32 the unpatched model is still better (10.00 -> 8.00 (-20.0 %))")
