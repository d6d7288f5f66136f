"""Text tokenised once: found again, resumed after a kill, repaired, shared by processes, and errors of the disk."""

import json
import multiprocessing
import os
import time

import datasets
import numpy as np
import pytest

from hfpos import PatchError
from hfpos.data import Source, tokenized, train_tokenizer
from hfpos.data.tokenized import tokenize_source
from tests.data.byte_tokens import BYTES, calls, ids


__all__ = ["calls"]

TEXTS = ["first document", "2", "the third, äöü ☺", "and another one", "five", "end"]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(tokenized, "_TOKENS_A_SHARD", 15)  # documents 0 and 1, 2, 3, 4 and 5
    monkeypatch.setattr(tokenized, "_DOCUMENTS_AT_ONCE", 2)


@pytest.fixture
def folder(tmp_path):
    """A folder with one text file a document."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(TEXTS):
        (texts / f"{number}.txt").write_text(text, encoding="utf-8")
    return texts


def documents_of(shards):
    return [shards.tokens(number, 0, int(length)).tolist() for number, length in enumerate(shards.lengths)]


def files_of(shards):
    return {path.name: path.read_bytes() for path in shards.folder.iterdir() if path.name != "lock"}


def test_ids_names_and_pieces(folder, tmp_path):
    shards = tokenize_source(Source(folder), BYTES, cache_dir=tmp_path)
    assert documents_of(shards) == [ids(text) for text in TEXTS]
    assert [shards.name(number) for number in range(6)] == [f"{number}.txt" for number in range(6)]
    assert shards.tokens(2, 3, 7).tolist() == ids(TEXTS[2])[3:7]
    assert files_of(shards).keys() == {f"0000{n}.{kind}" for n in range(4) for kind in ("tokens", "json")}
    assert shards.folder.parent == tmp_path / "shards"


def test_found_again_without_reading(folder, tmp_path, calls, monkeypatch):
    first = tokenize_source(Source(folder), BYTES, cache_dir=tmp_path)
    assert calls == TEXTS
    with monkeypatch.context() as patch:
        patch.setattr(tokenized, "read_source", None)
        again = tokenize_source(Source(str(folder)), BYTES, cache_dir=tmp_path)
    assert (documents_of(again), again.sha256, calls) == (documents_of(first), first.sha256, TEXTS)
    (folder / "5.txt").write_text("END")
    changed = tokenize_source(Source(folder), BYTES, cache_dir=tmp_path)
    assert documents_of(changed)[5] == ids("END")
    assert changed.sha256 != first.sha256
    other = train_tokenizer(["the the the"] * 9, vocab_size=270)
    assert tokenize_source(Source(folder), other, cache_dir=tmp_path).lengths[2] < first.lengths[2]


@pytest.mark.parametrize("documents", range(7))
def test_killed_and_begun_again(folder, tmp_path, monkeypatch, documents):
    """Whatever the moment, finished shards are kept, and the others are as if nothing had been."""
    whole = tokenize_source(Source(folder), BYTES, cache_dir=tmp_path / "whole")
    original = type(BYTES)._encode_plus
    asked = []

    def killed(self, text, *args, **kwargs):
        asked.extend(text)
        if len(asked) > documents:
            raise KeyboardInterrupt
        return original(self, text, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(BYTES), "_encode_plus", killed)
        if documents < len(TEXTS):
            with pytest.raises(KeyboardInterrupt):
                tokenize_source(Source(folder), BYTES, cache_dir=tmp_path / "killed")
    partial = tmp_path / "killed" / "shards" / whole.folder.name
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("0*")}
    again = tokenize_source(Source(folder), BYTES, cache_dir=tmp_path / "killed")
    assert files_of(again) == files_of(whole)
    assert all((partial / name).stat().st_mtime_ns == time for name, time in finished.items())
    # documents are tokenised two at a time
    assert len(finished) == 2 * [0, 0, 1, 1, 3, 3, 0][documents]


def test_a_resumed_run_tokenises_only_the_rest(folder, tmp_path, calls):
    shards = tokenize_source(Source(folder), BYTES, cache_dir=tmp_path)
    before = files_of(shards)
    for path in shards.folder.glob("00003*"):
        path.unlink()
    calls.clear()
    assert files_of(tokenize_source(Source(folder), BYTES, cache_dir=tmp_path)) == before
    assert calls == TEXTS[4:]


def flip(path):
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "00001.tokens"),
        lambda folder: (folder / "00001.tokens").write_bytes((folder / "00001.tokens").read_bytes()[:-1]),
        lambda folder: (folder / "00001.tokens").write_bytes(b""),
        lambda folder: (folder / "00001.tokens").unlink(),
        lambda folder: (folder / "00001.json").unlink(),
        lambda folder: (folder / "00001.json").write_text("{"),
        lambda folder: (folder / "00001.json").write_text("{}"),
        lambda folder: (folder / "00001.json").write_text(
            json.dumps(json.loads((folder / "00001.json").read_text()) | {"lengths": [10, 11]})
        ),
    ],
)
def test_a_damaged_shard_is_made_anew(folder, tmp_path, calls, damage):
    shards = tokenize_source(Source(folder), BYTES, cache_dir=tmp_path)
    before, read = files_of(shards), documents_of(shards)
    damage(shards.folder)
    calls.clear()
    again = tokenize_source(Source(folder), BYTES, cache_dir=tmp_path)
    assert (files_of(again), documents_of(again)) == (before, read)
    assert calls == TEXTS[2:4]  # a batch; what comes after is whole


def test_shards_that_vanish_while_in_use(folder, tmp_path):
    shards = tokenize_source(Source(folder), BYTES, cache_dir=tmp_path)
    (shards.folder / "00001.tokens").unlink()
    with pytest.raises(PatchError, match=r"texts cannot be read from .*00001\.tokens any more.*start again"):
        shards.tokens(2, 0, 3)


def one_of_many(folder, cache, log):
    original = type(BYTES)._encode_plus

    def slow(self, text, *args, **kwargs):
        time.sleep(0.05)
        if isinstance(text, list):
            with log.open("a") as file:
                file.write(f"{os.getpid()} {len(text)}\n")
        return original(self, text, *args, **kwargs)

    type(BYTES)._encode_plus = slow
    shards = tokenize_source(Source(folder), BYTES, cache_dir=cache)
    os._exit(0 if documents_of(shards) == [ids(text) for text in TEXTS] else 1)


def test_of_several_processes_one_tokenises(folder, tmp_path):
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    processes = [context.Process(target=one_of_many, args=(folder, tmp_path / "cache", log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    asked = [line.split() for line in log.read_text().splitlines()]
    assert len({process for process, _ in asked}) == 1
    assert sum(int(count) for _, count in asked) == len(TEXTS)


def test_a_source_that_ends_with_a_shard(tmp_path):
    shards = tokenize_source(Source(TEXTS[:3]), BYTES, cache_dir=tmp_path)
    assert documents_of(shards) == [ids(text) for text in TEXTS[:3]]
    assert shards.name(2) == "document 2"
    assert documents_of(tokenize_source(Source(TEXTS[:3]), BYTES, cache_dir=tmp_path)) == documents_of(shards)


@pytest.mark.parametrize(("vocabulary", "size"), [(65_536, 2), (65_537, 4)])
def test_large_vocabularies_take_more_bytes(vocabulary, size, tmp_path):
    tokenizer = train_tokenizer([], vocab_size=258)
    tokenizer.add_tokens([f"<{number}>" for number in range(258, vocabulary)])
    text = f"a<{vocabulary - 1}>b"
    shards = tokenize_source(Source([text]), tokenizer, cache_dir=tmp_path)
    assert documents_of(shards) == [[*ids("a"), vocabulary - 1, *ids("b")]]
    assert shards.dtype == np.dtype(f"<u{size}")


@pytest.mark.parametrize(
    ("tokens", "documents"), [(1, 1), (14, 1), (15, 2), (16, 3), (36, 3), (37, 4), (55, 5), (57, 6), (10_000, 6)]
)
def test_only_so_many_tokens(folder, tmp_path, calls, tokens, documents):
    shards = tokenize_source(Source(folder, max_tokens=tokens), BYTES, cache_dir=tmp_path)
    assert sum(documents_of(shards), []) == sum((ids(text) for text in TEXTS), [])[:tokens]
    assert len(shards.lengths) == documents
    assert len(calls) in (documents, documents + 1)


def test_streaming_reads_no_more_than_asked_for(tmp_path, monkeypatch):
    rows = []

    def generate():
        for number in range(1000):
            rows.append(number)
            yield {"text": f"document {number:03}"}

    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split, streaming: datasets.IterableDataset.from_generator(generate)
    )
    source = Source("some/name", split="train", streaming=True, max_tokens=50)
    shards = tokenize_source(source, BYTES, cache_dir=tmp_path)
    assert shards.lengths.tolist() == [12, 12, 12, 12, 2]
    assert len(rows) <= 6
    (shards.folder / "00001.tokens").unlink()
    assert files_of(tokenize_source(source, BYTES, cache_dir=tmp_path)).keys() >= {"00001.tokens"}
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert tokenize_source(source, BYTES, cache_dir=tmp_path).lengths.tolist() == [12, 12, 12, 12, 2]


def test_a_source_that_breaks_off_is_gone_on_with(tmp_path, monkeypatch, calls):
    broken = [True]

    def generate():
        for number in range(9):
            if number == 5 and broken:
                raise ConnectionError("no\nnetwork")
            yield {"text": f"document {number}"}

    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split, streaming: datasets.IterableDataset.from_generator(generate)
    )
    source = Source("some/name", streaming=True)
    with pytest.raises(
        PatchError, match=r"some/name cannot be read on after document 5 \(ConnectionError: no network\)"
    ):
        tokenize_source(source, BYTES, cache_dir=tmp_path)
    broken.clear()
    calls.clear()
    shards = tokenize_source(source, BYTES, cache_dir=tmp_path)
    assert documents_of(shards) == [ids(f"document {number}") for number in range(9)]
    assert "document 1" not in calls


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        PatchError, match=r"list of 1 cannot be kept in .*file.*expected a folder that can be written to"
    ):
        tokenize_source(Source(["text"]), BYTES, cache_dir=tmp_path / "file")


def test_a_full_disk_keeps_finished_shards(folder, tmp_path, monkeypatch):
    whole = tokenize_source(Source(folder), BYTES, cache_dir=tmp_path / "whole")

    def full(path, content):
        if path.name.startswith("00002.json"):
            path.touch()
            raise OSError(28, "No space left on device")
        original(path, content)

    original = type(tmp_path).write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "write_bytes", full)
        with pytest.raises(PatchError, match=r"No space left on device.*HFPOS_CACHE.*Finished shards are kept"):
            tokenize_source(Source(folder), BYTES, cache_dir=tmp_path / "full")
    (partial,) = (tmp_path / "full" / "shards").iterdir()
    assert {path.name for path in partial.glob("0*")} == {
        "00000.json",
        "00000.tokens",
        "00001.json",
        "00001.tokens",
        "00002.tokens",
    }
    assert files_of(tokenize_source(Source(folder), BYTES, cache_dir=tmp_path / "full")) == files_of(whole)


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HFPOS_CACHE", str(tmp_path / "mine"))
    assert tokenize_source(Source(["text"]), BYTES).folder.parent == tmp_path / "mine" / "shards"
    monkeypatch.delenv("HFPOS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tokenize_source(Source(["text"]), BYTES).folder.parent == tmp_path / "xdg" / "hfpos" / "shards"
