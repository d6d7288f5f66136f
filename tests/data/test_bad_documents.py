"""Text that cannot be had: named in the error, or listed where asked for."""

import gzip

import datasets
import pytest

from hfpos import PatchError
from hfpos.data import load_documents, train_tokenizer


@pytest.fixture
def load(tmp_path):
    """`load_documents` with a tokenizer and a cache of the test's own."""
    tokenizer = train_tokenizer([], vocab_size=258)
    return lambda source, given=tokenizer, **options: load_documents(
        source, given, cache_dir=tmp_path / "cache", **options
    )


def names_of(loaded):
    return [document.name for document in loaded.documents]


@pytest.fixture
def bad_folder(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    (folder / "c.txt").write_text(" \n")
    (folder / "d.jsonl").write_bytes(
        b'{"text": "also good"}\n{"other": 1}\n{"text": "\xff"}\n{"te\n{"text": "\\ud800"}\n'
    )
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "cut off"}\n' * 99)[:20])
    (folder / "f.txt").symlink_to(folder / "nowhere")
    return folder


def test_bad_documents_are_listed_where_asked_for(load, bad_folder):
    loaded = load(bad_folder, skip_bad=True)
    assert names_of(loaded) == ["a.txt", "d.jsonl:1"]
    reasons = {each.document: each.reason for each in loaded.skipped}
    expected = {
        "b.txt": "expected UTF-8 text",
        "c.txt": "c.txt is empty",
        "d.jsonl:2": r"line 2 has the fields \['other'\]",
        "d.jsonl:3": r"line 3 .*expected UTF-8 text",
        "d.jsonl:4": "line 4 is not JSON",
        "d.jsonl:5": "surrogates not allowed",
        "e.jsonl.gz": "cannot read .*e.jsonl.gz",
        "f.txt": "cannot read .*f.txt",
    }
    assert list(reasons) == list(expected)
    for name, pattern in expected.items():
        with pytest.raises(PatchError, match=pattern):
            raise PatchError(reasons[name])
    with pytest.raises(PatchError, match=r"cannot read .*b\.txt"):
        load(bad_folder)
    for name in ("a.txt", "d.jsonl"):
        (bad_folder / name).unlink()
    with pytest.raises(
        PatchError, match=r"none of the 4 documents .*bad can be used; the first: cannot read .*b\.txt"
    ):
        load(bad_folder, skip_bad=True)


DATA = datasets.Dataset.from_dict({"body": ["a", "b"]})


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (["text"], {"given": None}, "missing tokenizer"),
        (["text"], {"given": "gpt2"}, "the tokenizer is a str"),
        (["good", ""], {}, "document 1 is empty"),
        ([], {}, "no text in list of 0"),
        (["good", [1, 2]], {}, "document 1 is a list; expected a text"),
        ([{"title": "x"}], {}, r"document 0 is a row with the fields \['title'\]"),
        ([{"text": None}], {}, "document 0 is a row"),
        (DATA, {}, "no column 'text', only body"),
        (datasets.DatasetDict(train=DATA, test=DATA), {}, "splits train, test; say which"),
        (datasets.DatasetDict(train=DATA), {"split": "test"}, "no split 'test'; it has train"),
        (DATA, {"split": "test"}, "split='test' was given with Dataset of 2"),
        ("stdlib", {"split": "test"}, "split='test' was given with stdlib"),
        (7, {}, "cannot read documents from a int"),
        ("no/such/file.txt", {}, "no text at no/such/file.txt"),
        ("./nowhere", {}, "no text at ./nowhere"),
        (["a b", "a b c d"], {"min_tokens": 50}, "the longest, document 1, has . tokens"),
        (["a b"], {"block_tokens": 50}, "block_tokens=50.*document 0"),
        (["a"], {"max_tokens": 0}, "max_tokens=0"),
        (["a"], {"block_tokens": 2.0}, "block_tokens=2.0"),
        (["a"], {"min_tokens": None}, "min_tokens=None"),
        (["a"], {"max_documents": True}, "max_documents=True"),
        (["a"], {"seed": 1}, "seed=1 was given without max_documents"),
    ],
)
def test_errors(load, source, options, message):
    with pytest.raises(PatchError, match=message) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)


def test_a_name_that_cannot_be_loaded(load, monkeypatch):
    def fail(name, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(PatchError, match=r"'wikitex' is no file.*no network\).*check the spelling"):
        load("wikitex")


def test_an_empty_folder(load, tmp_path):
    with pytest.raises(PatchError, match="no text in"):
        load(tmp_path)
