"""`search` on a model that was trained for a few seconds: it beats its starts, leaves no trace, resumes, and says what is wrong."""

import copy
import json
import multiprocessing
import os
import random

import pytest
import torch
from accelerate import PartialState

import hfpos
from hfpos import PatchError
from hfpos.evaluate import perplexity
from hfpos.search import fitness, search
from tests.processes import leave
from tests.search.language import TARGET, TRAINED, language, trained_model
from tests.tiny import tiny


SMALL = {"population": 12, "iterations": 4, "mutations": 4, "crossovers": 4, "parents": 6}
FEW = {"population": 8, "iterations": 3, "mutations": 3, "crossovers": 2, "parents": 4}
TINY = {"population": 5, "iterations": 1, "mutations": 2, "crossovers": 1, "parents": 2}
DOCUMENTS = language(8, TARGET, seed=1)


@pytest.fixture(scope="module")
def model():
    return trained_model()


def measured(model, documents, scheme, **parameters):
    with hfpos.patched(model, scheme, **parameters):
        return perplexity(model, documents, [TARGET]).by_length[TARGET].perplexity


def test_it_beats_yarn_on_its_documents_and_on_others(model):
    before = copy.deepcopy(model)
    result = search(model, DOCUMENTS, TARGET, **SMALL)
    table = result.perplexity
    assert table["best"][TARGET] < 0.97 * table["yarn"][TARGET]
    assert table["best"][TARGET] < min(table[start][TARGET] for start in ("pi", "ntk", "yarn"))
    assert table["best"][TARGET] < result.as_schemes["yarn"][TARGET]
    assert result.history[-1].perplexity == table["best"][TARGET]
    assert result.history[-1].candidates == 12 + 4 * 8
    held_out = language(32, TARGET, seed=2)
    assert measured(model, held_out, "longrope", **result.parameters) < 0.97 * measured(
        model, held_out, "yarn", factor=4
    )

    # what is handed out is what was measured
    assert measured(model, DOCUMENTS, "longrope", **result.parameters) == table["best"][TARGET]
    assert measured(model, DOCUMENTS, "yarn", factor=4) == result.as_schemes["yarn"][TARGET]
    unpatched = perplexity(model, DOCUMENTS, [TRAINED, TARGET]).by_length
    assert table["unpatched"] == {length: score.perplexity for length, score in unpatched.items()}

    assert list(result.long_factor) == sorted(result.long_factor)
    assert 1 <= result.long_factor[0] <= result.long_factor[-1] <= 5
    assert result.short_factor == (1.0,) * 8
    assert (result.original_length, result.target_length) == (TRAINED, TARGET)

    assert not hfpos.describe(model).patched
    assert model.config.to_dict() == before.config.to_dict()
    ids = torch.tensor(DOCUMENTS[:1])
    assert torch.equal(model(ids).logits, before(ids).logits)


def counted(monkeypatch, stop_after=None):
    """The candidates that are measured and not read from a journal; the process dies after `stop_after` of them."""
    asked = []
    real = fitness.Fitness.__call__

    def measure(self, factors):
        if len(asked) == stop_after:
            raise KeyboardInterrupt
        asked.append(factors)
        return real(self, factors)

    monkeypatch.setattr(fitness.Fitness, "__call__", measure)
    return asked


def test_a_killed_search_goes_on_and_ends_as_if_it_had_not_been(monkeypatch, model, tmp_path):
    expected = search(model, DOCUMENTS, TARGET, **FEW)
    asked = counted(monkeypatch, stop_after=15)
    with pytest.raises(KeyboardInterrupt):
        search(model, DOCUMENTS, TARGET, resume=tmp_path, **FEW)
    assert not hfpos.describe(model).patched
    journal = tmp_path / "candidates.jsonl"
    journal.write_text(
        journal.read_text(encoding="utf-8")[:-9], encoding="utf-8"
    )  # cut off while it was being written
    monkeypatch.undo()
    asked = counted(monkeypatch)
    assert search(model, DOCUMENTS, TARGET, resume=tmp_path, **FEW) == expected
    assert len(asked) == expected.history[-1].candidates - 14
    # nothing is left to do; and then a longer search begins with what is known
    asked.clear()
    assert search(model, DOCUMENTS, TARGET, resume=tmp_path, **FEW) == expected
    assert asked == []
    longer = search(model, DOCUMENTS, TARGET, resume=tmp_path, **FEW | {"iterations": 4})
    assert longer.history[:4] == expected.history
    assert len(asked) == 5


def test_a_journal_of_another_search_is_refused(model, tmp_path):
    search(model, DOCUMENTS, TARGET, resume=tmp_path, **TINY)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight += 1
    changes = {
        "model": (other, DOCUMENTS, TARGET, {}),
        "data": (model, DOCUMENTS[:3], TARGET, {}),
        "lengths": (model, DOCUMENTS, 100, {}),
        "attention_factor": (model, DOCUMENTS, TARGET, {"attention_factor": 1.0}),
        "bos": (model, DOCUMENTS, TARGET, {"bos": "first", "bos_token_id": 0}),
    }
    for name, (which, documents, target, more) in changes.items():
        with pytest.raises(PatchError, match=f"of another search: {name} .*choose another folder"):
            search(which, documents, target, resume=tmp_path, **TINY, **more)
    (tmp_path / "file").touch()
    with pytest.raises(PatchError, match="is a file; expected a folder"):
        search(model, DOCUMENTS, TARGET, resume=tmp_path / "file", **TINY)


def test_the_attention_factor_is_that_of_every_candidate(model):
    result = search(model, DOCUMENTS, TARGET, attention_factor=1.0, **TINY)
    # PI has none of its own, so it is now the scheme itself
    assert result.perplexity["pi"][TARGET] == pytest.approx(result.as_schemes["linear"][TARGET], rel=1e-6)
    assert result.parameters["attention_factor"] == 1.0
    assert search(model, DOCUMENTS, TARGET, **TINY).attention_factor == pytest.approx(1.1832, abs=1e-4)


def test_a_patched_model_is_searched_from_its_own_start_and_comes_back_patched(model):
    expected = search(model, DOCUMENTS, TARGET, **TINY)
    with hfpos.patched(model, "ntk", factor=2):
        found = search(model, DOCUMENTS, TARGET, **TINY)
        assert hfpos.describe(model).scheme == "ntk"
    assert found.long_factor == expected.long_factor
    assert found.perplexity["unpatched"] != expected.perplexity["unpatched"]


@pytest.mark.parametrize(
    ("family", "dtype", "pairs"),
    [("qwen2", torch.float32, 8), ("gpt_neox", torch.float32, 2), ("gemma3_text", torch.bfloat16, 8)],
)
def test_other_families_odd_lengths_and_a_bos(family, dtype, pairs):
    model = tiny(family).to(dtype)
    documents = [torch.randint(3, 90, (size,), generator=torch.Generator().manual_seed(size)) for size in (100, 131)]
    result = search(model, documents, 101, bos="every-window", bos_token_id=1, **TINY)
    assert len(result.long_factor) == pairs
    hfpos.patch(model, "longrope", **result.parameters)
    score = perplexity(model, documents, [64, 101], bos="every-window", bos_token_id=1).by_length
    assert {length: each.perplexity for length, each in score.items()} == result.perplexity["best"]


def test_a_model_that_somebody_allowed_longer_inputs():
    model = tiny("llama", max_position_embeddings=4096)
    documents = [torch.arange(150) % 90]
    with pytest.raises(PatchError, match="target_length=128 is not beyond the original length 4096"):
        search(model, documents, 128, **TINY)
    result = search(model, documents, 128, original_length=64, **TINY)
    assert result.perplexity["best"].keys() == {64, 128}
    assert result.parameters["original_length"] == 64
    assert hfpos.patch(model, "longrope", **result.parameters).config.max_position_embeddings == 128


def test_the_model_is_left_alone_when_a_measurement_fails(monkeypatch, model):
    def fail(*args, **kwargs):
        assert hfpos.describe(model).scheme == "longrope"
        raise PatchError("out of memory")

    monkeypatch.setattr(fitness, "perplexity", fail)
    with pytest.raises(PatchError, match="out of memory"):
        search(model, DOCUMENTS, TARGET, **TINY)
    assert not hfpos.describe(model).patched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_length": TRAINED}, "target_length=32 is not beyond the original length 32"),
        ({"target_length": 20}, "target_length=20 is not beyond the original length 32"),
        ({"target_length": "32k"}, "target_length='32k' is not usable"),
        ({"original_length": 64}, "original_length=64 conflicts"),
        ({"documents": [DOCUMENTS[0], DOCUMENTS[1][:100]]}, r"document 1 has 100 tokens, .* length 128 \(1 of 2"),
        ({"documents": []}, "no documents"),
        ({"documents": [[99] * TARGET]}, "document 0 has ids from 99"),
        ({"attention_factor": 0}, "attention_factor=0 is not usable"),
        ({"parents": 0}, "parents=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_what_cannot_be_searched(model, arguments, message):
    given = {"documents": DOCUMENTS, "target_length": TARGET} | TINY | arguments
    with pytest.raises(PatchError, match=message):
        search(model, **given)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt"])
def test_models_without_rotary_embeddings_are_refused(family):
    with pytest.raises(PatchError, match="has no rotary embeddings in use"):
        search(tiny(family), [list(range(90)) * 2], 150, **TINY)


def test_a_rotation_that_a_patch_took_away_is_missing_too(model):
    with hfpos.patched(model, "alibi"), pytest.raises(PatchError, match="its positions are 'alibi'"):
        search(model, DOCUMENTS, TARGET, **TINY)


def small_search(folder):
    """What each process does: the result as plain values, and the error of a search that does not fit the folder's."""
    arguments = TINY | {"iterations": 2, "resume": folder / "journal"}
    result = search(tiny("llama", vocab_size=96), DOCUMENTS[:3], TARGET, **arguments)
    with pytest.raises(PatchError) as refused:
        search(tiny("llama", vocab_size=96), DOCUMENTS[:2], TARGET, **arguments)
    return [result.long_factor, result.perplexity["best"][TARGET], str(refused.value)]


def process_main(folder, rank):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    PartialState._reset_state()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)  # chance outside of the search differs from process to process
    random.seed(rank)
    (folder / f"{rank}.json").write_text(json.dumps(small_search(folder)), encoding="utf-8")
    leave()


def test_two_processes_search_as_one(tmp_path):
    context = multiprocessing.get_context("fork")  # a process that begins anew would take seconds to import torch
    processes = [context.Process(target=process_main, args=(tmp_path, rank)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    (tmp_path / "alone").mkdir()
    factors, best, _ = small_search(tmp_path / "alone")
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert found[:2] == [list(factors), pytest.approx(best, rel=1e-6)]
        assert "of another search: data" in found[2]
    journal = (tmp_path / "journal" / "candidates.jsonl").read_text(encoding="utf-8")
    assert journal.count("long_factor") == 5 + 2 * 3
