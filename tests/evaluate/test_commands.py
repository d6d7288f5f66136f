"""`hfpos eval`, `compare`, `report`, `describe --plot` as a user runs them: what is printed, written, and how they exit."""

import json

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import hfpos
from hfpos.data import train_tokenizer
from hfpos.evaluate import perplexity
from hfpos.evaluate.options import parse_lengths, parse_share
from hfpos.report.gate import trades
from hfpos.report.results import load
from tests.command_line import run
from tests.tiny import tiny


TEXTS = [" ".join(f"{i} times {j} is {i * j}." for i in range(150)) for j in range(4)]


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


def test_eval_ppl_prints_and_writes_what_perplexity_gives(monkeypatch, capsys, source, tmp_path):
    model, text, tokenizer = source
    out = tmp_path / "results.json"
    options = [
        "--lengths",
        "64,128",
        "--stride",
        32,
        "--bos",
        "every-window",
        "--max-tokens",
        400,
        "--resume",
        tmp_path / "journal",
    ]
    options += ["--scheme", "yarn", "--factor", 4, "--beta-fast=16", "--dtype", "float32", "--out", out]
    assert run(monkeypatch, "eval", "ppl", model, "--data", text, *options) == 0
    loaded = hfpos.patch(hfpos.from_pretrained(model), "yarn", factor=4, beta_fast=16)
    ids = [tokenizer(each).input_ids[:400] for each in TEXTS]
    expected = perplexity(loaded, ids, [64, 128], 32, bos="every-window").by_length
    printed = capsys.readouterr().out
    assert "effective context: " in printed
    found = load(out).comparisons[0]
    assert found.model.native_scheme == "yarn(factor=4, beta_fast=16)"
    assert (found.protocol.stride, found.protocol.bos, found.protocol.bos_token_id) == (32, "every-window", 0)
    assert found.data.preparation == {"max_tokens": 400}
    for length, score in found.runs[0].perplexity.by_length.items():
        assert score.nll == pytest.approx(expected[length].nll, rel=1e-5)
        assert f"{score.nll:.4f}" in printed
        assert score.bits_per_byte > 0


def test_blocks_are_the_longest_length_with_the_bos(monkeypatch, source, tmp_path):
    model, text, tokenizer = source
    out = tmp_path / "results.json"
    options = ["--lengths", "32,100", "--bos", "first", "--blocks", "--out", out]
    assert run(monkeypatch, "eval", "ppl", model, "--data", text, *options) == 0
    blocks = sum(len(tokenizer(each).input_ids) // 99 for each in TEXTS)
    assert {score.documents for score in load(out).comparisons[0].runs[0].perplexity.by_length.values()} == {blocks}


def test_compare_writes_a_report_and_gates(monkeypatch, capsys, source, tmp_path):
    model, text, _ = source
    arguments = [
        "compare",
        model,
        "--schemes",
        "none,linear,alibi,learned(init='tile')",
        "--lengths",
        "32,128,256",
        "--data",
        text,
    ]
    arguments += ["--retrieval", "key_value", "--trials", 2, "--depths", "0,1"]
    assert run(monkeypatch, *arguments, "--out", tmp_path / "a") == 0
    written = {path.name for path in (tmp_path / "a").iterdir()}
    assert {
        "results.json",
        "results.csv",
        "results.md",
        "index.html",
        "perplexity.png",
        "perplexity.svg",
        "retrieval.csv",
    } <= written
    assert "progress" not in written
    found = load(tmp_path / "a" / "results.json").comparisons[0]
    assert [run.label for run in found.runs] == ["none", "linear", "alibi"]
    assert "learned(init='tile')" in found.refused
    printed = capsys.readouterr().out
    assert str(tmp_path / "a" / "index.html") in printed
    assert "is for a model that has a table of positions" in printed

    worst = max(trades(found), key=lambda trade: trade.cost)
    assert worst.cost > 0.001
    assert run(monkeypatch, *arguments, "--out", tmp_path / "b", "--max-regression", "0.1%") == 1
    assert f"short context got worse by more than 0.1 %: {worst.label}" in capsys.readouterr().err

    files = [tmp_path / name / "results.json" for name in "ab"]
    assert run(monkeypatch, "report", *files, "--out", tmp_path / "merged", "--max-regression", "10000%") == 0
    assert len(load(tmp_path / "merged" / "results.json").comparisons) == 2


def test_compare_puts_several_models_side_by_side(monkeypatch, capsys, source, tmp_path):
    model, text, tokenizer = source
    for name in ("alibi", "nope"):
        hfpos.patch(hfpos.from_pretrained(model), name).save_pretrained(tmp_path / name / "model")
        tokenizer.save_pretrained(tmp_path / name / "model")
    folders = [tmp_path / name / "model" for name in ("alibi", "nope")]
    options = ["--data", text, "--lengths", "32,128", "--attention", 128, "--out", tmp_path / "out"]
    assert run(monkeypatch, "compare", *folders, *options) == 0
    assert "| alibi |" in capsys.readouterr().out
    found = load(tmp_path / "out" / "results.json").comparisons
    assert [(each.name, each.model.path, each.model.native_scheme) for each in found] == [
        ("alibi", str(folders[0]), "alibi()"),
        ("nope", str(folders[1]), "nope()"),
    ]
    alone = [run.perplexity.by_length[128].nll for each in found for run in each.runs]
    for folder, nll in zip(folders, alone, strict=True):
        ids = [tokenizer(each).input_ids for each in TEXTS]
        assert perplexity(hfpos.from_pretrained(folder), ids, [128]).by_length[128].nll == pytest.approx(nll, rel=1e-5)
    assert {"joint-perplexity.png", "joint-looks.png", "joint-heads.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert run(monkeypatch, "compare", folders[0], folders[0], *options) == 2
    assert "a model is given twice" in capsys.readouterr().err
    assert run(monkeypatch, "compare", *folders, *options, "--attention", 100_000) == 2
    assert "attention=100000 is not usable" in capsys.readouterr().err


def test_retrieval_commands(monkeypatch, capsys, source):
    model, text, _ = source
    grid = ["--lengths", 600, "--depths", "0.5", "--trials", 1]
    for command in (
        ["passkey"],
        ["needle", "--haystack", text, "--needles", 2, "--distractors", 1],
        ["key-value", "--pairs", 4],
    ):
        assert run(monkeypatch, "eval", command[0], model, *grid, *command[1:], "--scheme", "yarn", "--factor", 8) == 0
        assert "600" in capsys.readouterr().out


def test_describe_draws(monkeypatch, source, tmp_path):
    assert run(monkeypatch, "describe", source[0], "--plot", tmp_path / "waves.svg") == 0
    assert "wavelength" in (tmp_path / "waves.svg").read_text(encoding="utf-8")
    assert run(monkeypatch, "describe", source[0], "--plot", tmp_path / "waves.gif") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "1x"], "'1x' is not a number of tokens"),
        (["--lengths", "64", "--stride", "128"], "stride=128"),
        (["--lengths", "64", "--factor", "4"], "--factor; parameters of a scheme need --scheme"),
        (["--lengths", "64", "--scheme", "yarm"], "did you mean 'yarn'"),
        (["--lengths", "64", "--batch-size", "many"], "batch_size='many'"),
        (["--lengths", "100000"], "no document reaches length 100000"),
        (["--lengths", "64", "--tolerance", "lots"], "'lots' is not a share"),
        (["--lengths", "64", "--min-tokens", "100000"], "is long enough for min_tokens=100000"),
        (["--lengths", "64", "--text-column", "body", "--data", "rows.jsonl"], '"body"'),
        (["--lengths", "64", "--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(monkeypatch, capsys, source, tmp_path, arguments, message):
    model, text, _ = source
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXTS[0]}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    given = arguments if "--data" in arguments else [*arguments, "--data", text]
    assert run(monkeypatch, "eval", "ppl", model, *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hfpos: ")
    assert message in error


def test_short_documents_are_named_unless_skipped(monkeypatch, capsys, source, tmp_path):
    model, text, _ = source
    rows = [{"text": TEXTS[0]}, {"text": "two words"}, {"text": TEXTS[1]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ["eval", "ppl", model, "--data", tmp_path / "rows.jsonl", "--lengths", "64"]
    assert run(monkeypatch, *arguments) == 2
    assert "rows.jsonl:2: it has" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--skip-bad") == 0
    assert "skipped: rows.jsonl:2: it has" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call
def test_an_adapter_is_measured_with_its_scheme_and_its_base_models_tokenizer(monkeypatch, capsys, source, tmp_path):
    model, text, tokenizer = source
    base = hfpos.patch(AutoModelForCausalLM.from_pretrained(model), "yarn", factor=4)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    ids = [tokenizer(each).input_ids for each in TEXTS]
    expected = perplexity(adapted, ids, [100]).by_length[100].nll
    assert run(monkeypatch, "eval", "ppl", tmp_path, "--data", text, "--lengths", 100, "--dtype", "float32") == 0
    assert f"{expected:.4f}" in capsys.readouterr().out


def test_models_that_cannot_be_measured(monkeypatch, capsys, source, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "bare")
    arguments = ["--data", source[1], "--lengths", "64"]
    assert run(monkeypatch, "eval", "ppl", tmp_path / "bare", *arguments) == 2
    assert "no tokenizer in" in capsys.readouterr().err
    assert run(monkeypatch, "eval", "ppl", "nothing.gguf", *arguments) == 2
    assert "nothing.gguf is not a file" in capsys.readouterr().err
    assert run(monkeypatch, "report", source[0] / "config.json") == 2
    assert "is not a results.json" in capsys.readouterr().err


def test_numbers_as_they_are_written():
    assert parse_lengths("512, 1k,2K") == [512, 1024, 2048]
    assert (parse_share("1%"), parse_share("0.5 %".replace(" ", ""))) == (0.01, 0.005)
    for text in ("-1%", "nan", "inf", ""):
        with pytest.raises(hfpos.PatchError, match="is not a share"):
            parse_share(text)
