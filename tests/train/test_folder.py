"""One run a folder: what is there is never overwritten, and half a checkpoint is not gone on from."""

import json

import pytest

import hfpos
from hfpos.train.folder import RunFolder
from hfpos.train.recipe import Recipe


def recipe(folder, **training):
    values = {
        "model": {"path": "m"},
        "data": {"sources": "b", "length": 8},
        "training": {"output_dir": str(folder), **training},
    }
    return Recipe.parse(values)


def checkpoint(folder, step, state='{"global_step": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(state, encoding="utf-8")
    return path


def test_the_same_recipe_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    first = RunFolder(tmp_path / "run")
    first.begin(recipe(tmp_path))
    assert first.newest_checkpoint() is None
    first.end()
    checkpoint(first.path, 9)
    newest = checkpoint(first.path, 10)
    torn = checkpoint(first.path, 20, state='{"global')
    empty = first.path / "checkpoint-30"
    empty.mkdir()
    again = RunFolder(first.path)
    again.begin(recipe(tmp_path))
    assert again.newest_checkpoint() == newest
    assert not torn.exists()
    assert not empty.exists()
    again.end()


def test_two_runs_at_once(tmp_path):
    first = RunFolder(tmp_path)
    first.begin(recipe(tmp_path))
    with pytest.raises(hfpos.PatchError, match="another run is at work"):
        RunFolder(tmp_path).begin(recipe(tmp_path))
    first.end()
    RunFolder(tmp_path).begin(recipe(tmp_path))


def test_another_recipe_in_the_same_folder(tmp_path):
    first = RunFolder(tmp_path)
    first.begin(recipe(tmp_path, learning_rate=1e-4))
    first.end()
    with pytest.raises(hfpos.PatchError, match=r"training\.learning_rate was 0\.0001 and is 0\.0002"):
        RunFolder(tmp_path).begin(recipe(tmp_path, learning_rate=2e-4))


def test_a_finished_run_and_foreign_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("...", encoding="utf-8")
    with pytest.raises(hfpos.PatchError, match=r"files that are of no run \(thesis\.tex\)"):
        RunFolder(tmp_path).begin(recipe(tmp_path))
    done = RunFolder(tmp_path / "done")
    done.begin(recipe(tmp_path))
    done.model.mkdir()
    done.end()
    with pytest.raises(hfpos.PatchError, match="a finished run"):
        RunFolder(tmp_path / "done").begin(recipe(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(hfpos.PatchError, match="cannot write to"):
        RunFolder(tmp_path / "file" / "run").begin(recipe(tmp_path))


def test_results_are_kept_whole(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.read_results() == {}
    folder.write_results({"steps": 3})
    assert folder.read_results() == {"steps": 3}
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"steps": 3}
    folder.write_results({"evaluations": [{"score": float("inf"), "loss": 1.5}], "baseline": {128: 2.0}})
    assert folder.read_results() == {"evaluations": [{"score": None, "loss": 1.5}], "baseline": {"128": 2.0}}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
