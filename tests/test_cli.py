"""The `hfpos` command, run as its users run it: real arguments, exit codes, one-line errors."""

import json
import subprocess
import sys

import pytest
import torch

import hfpos
from tests.command_line import run
from tests.tiny import tiny


IDS = torch.arange(2, 100)[None]


@pytest.fixture
def source(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "source")
    return model, tmp_path / "source"


def test_patch_writes_what_patch_makes(monkeypatch, capsys, source, tmp_path):
    model, folder = source
    target = tmp_path / "target"
    assert run(monkeypatch, "patch", folder, target, "--scheme", "yarn", "--factor", 4, "--beta-fast=16") == 0
    assert "yarn (patched, proved)" in capsys.readouterr().out
    hfpos.patch(model, "yarn", factor=4, beta_fast=16)
    with torch.no_grad():
        assert torch.equal(hfpos.from_pretrained(target)(IDS).logits, model(IDS).logits)


def test_patch_keeps_the_dtype(monkeypatch, tmp_path):
    tiny("llama").bfloat16().save_pretrained(tmp_path / "source")
    assert run(monkeypatch, "patch", tmp_path / "source", tmp_path / "target", "--scheme", "alibi") == 0
    assert hfpos.from_pretrained(tmp_path / "target", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheme", "yarm"], "did you mean 'yarn'"),
        (["--scheme", "yarn", "--facter", "4"], "did you mean 'factor'"),
        (["--scheme", "yarn", "--factor", "0"], "expected a finite number >= 1"),
        (["--scheme", "yarn", "--factor", "4", "--target-length", "512"], "both factor=4 and target_length=512"),
        (["--scheme", "yarn", "--factor"], "--factor has no value"),
        (["--scheme", "yarn", "--factor", "4", "stray"], "'stray' is not expected here"),
        (["--scheme", "learned", "--target-length", "512", "--init", "tile"], "is for a model that has a table"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(monkeypatch, capsys, source, tmp_path, arguments, message):
    assert run(monkeypatch, "patch", source[1], tmp_path / "target", *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hfpos: ")
    assert message in error
    assert not (tmp_path / "target").exists()


def test_patch_does_not_write_over_something(monkeypatch, capsys, source, tmp_path):
    assert run(monkeypatch, "patch", source[1], source[1], "--scheme", "yarn", "--factor", "4") == 2
    assert "--overwrite" in capsys.readouterr().err


def test_describe_reads_no_weights(monkeypatch, capsys, source):
    model, folder = source
    (folder / "model.safetensors").unlink()
    assert run(monkeypatch, "describe", folder, "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert described["scheme"] == "rope"
    assert described["wavelengths"] == pytest.approx(hfpos.describe(model).wavelengths)


@pytest.mark.parametrize(("scheme", "parameters"), [("ntk", {"factor": 4}), ("dynamic", {}), ("alibi", {})])
def test_describe_of_a_saved_model_equals_that_of_the_live_one(monkeypatch, capsys, tmp_path, scheme, parameters):
    model = hfpos.patch(tiny("llama"), scheme, prove=False, **parameters)
    model.save_pretrained(tmp_path)
    assert run(monkeypatch, "describe", tmp_path) == 0
    assert capsys.readouterr().out.strip() == str(hfpos.describe(model))


def test_describe_of_a_missing_folder(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "describe", tmp_path / "nothing") == 2
    assert "is not a folder" in capsys.readouterr().err


def test_lists_name_every_scheme_and_family(monkeypatch, capsys):
    assert run(monkeypatch, "schemes") == 0
    listed = {line.split()[0].rstrip(",") for line in capsys.readouterr().out.splitlines()[1:]}
    assert listed == set(hfpos.schemes())
    assert run(monkeypatch, "families") == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]}
    assert listed == set(hfpos.families())


def test_help_and_unknown_command_as_a_process():
    helped = subprocess.run([sys.executable, "-m", "hfpos.cli", "--help"], capture_output=True, text=True)
    assert helped.returncode == 0
    assert "describe" in helped.stdout
    unknown = subprocess.run([sys.executable, "-m", "hfpos.cli", "pacth"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "pacth" in unknown.stderr


def test_bench_names():
    from hfpos.bench.run import run as run_bench

    with pytest.raises(hfpos.PatchError, match="did you mean 'bloom'"):
        run_bench("blom")
