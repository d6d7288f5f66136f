"""Text for evaluation: every kind of source, cutting and filtering, bytes of tokens, and the cache on disk."""

import gzip
import hashlib
import json
import sys

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hfpos import PatchError
from hfpos.data import load_documents, sources, train_tokenizer


TEXTS = [
    "Über den Wolken, über dem Meer.\n\n  Und weiter: 日本語 und 😀👩‍👩‍👧!  ",
    "one two three\nfour",
    "x = 1  # ok",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS[:2] * 3, vocab_size=300)


@pytest.fixture
def load(tokenizer, tmp_path):
    """`load_documents` with the tokenizer and a cache of the test's own."""
    return lambda source, given=tokenizer, **options: load_documents(
        source, given, **{"cache_dir": tmp_path / "cache", **options}
    )


@pytest.fixture
def calls(tokenizer, monkeypatch):
    """How many texts the tokenizer was asked for."""
    asked = []
    original = type(tokenizer)._encode_plus

    def counting(self, text, *args, **kwargs):
        asked.extend(text)
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "_encode_plus", counting)
    return asked


def ids_of(loaded):
    return [document.ids.tolist() for document in loaded.documents]


def names_of(loaded):
    return [document.name for document in loaded.documents]


def long_text(words):
    return " ".join(f"w{number}" for number in range(words))


def test_every_source_gives_the_same_ids(load, tokenizer, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for index, text in enumerate(TEXTS):
        (folder / f"{index}.txt").write_text(text, encoding="utf-8")
    rows = [{"id": index, "body": text} for index, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    data = datasets.Dataset.from_list(rows)
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    split = {"text_column": "body", "split": "test"}
    for source, options in [
        (TEXTS, {}),
        (folder, {}),
        (str(tmp_path / "rows.jsonl"), {"text_column": "body"}),
        (tmp_path / "rows.jsonl.gz", {"text_column": "body"}),
        (data, {"text_column": "body"}),
        (data["body"], {}),
        (data.to_iterable_dataset(), {"text_column": "body"}),
        (datasets.DatasetDict(test=data), {"text_column": "body"}),
        (datasets.DatasetDict(train=data.select([0]), test=data), split),
    ]:
        loaded = load(source, **options)
        assert ids_of(loaded) == expected, source
        assert all(document.ids.dtype == torch.int64 for document in loaded.documents)
        assert loaded.preparation == options
        assert loaded.skipped == ()
    assert names_of(load(folder)) == ["0.txt", "1.txt", "2.txt"]
    assert names_of(load(tmp_path / "rows.jsonl", text_column="body"))[1] == "rows.jsonl:2"
    assert load(folder).source == str(folder)


def test_a_dataset_by_name(load, monkeypatch):
    asked = []

    def fake(name, split):
        asked.append((name, split))
        data = datasets.Dataset.from_dict({"text": TEXTS})
        return data if split else datasets.DatasetDict(train=data, test=data.select([1]))

    monkeypatch.setattr(datasets, "load_dataset", fake)
    loaded = load("some/name", split="train")
    assert (ids_of(loaded), loaded.source, asked) == (ids_of(load(TEXTS)), "some/name", [("some/name", "train")])
    with pytest.raises(PatchError, match="splits train, test; say which"):
        load("some/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PatchError, match=r"no file or folder.*hfpos\[data\]"):
        load("some/name")


def test_the_standard_library(load, monkeypatch):
    library = [document for document in sources.standard_library() if document.name in ("ast.py", "this.py", "bdb.py")]
    monkeypatch.setattr(sources, "standard_library", lambda: library)
    loaded = load("stdlib", max_tokens=20)
    assert (names_of(loaded), loaded.source) == (["ast.py", "bdb.py"], "stdlib")


def slow_bytes(tokenizer, text):
    """The bytes of each token, one token at a time."""
    ends, last = [], 0
    for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping:
        last = max(last, len(text[:end].encode()))
        ends.append(last)
    ends[-1] = len(text.encode())
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def test_bytes_of_tokens(load, tokenizer):
    for document, text in zip(load(TEXTS).documents, TEXTS, strict=True):
        assert document.token_bytes.tolist() == slow_bytes(tokenizer, text)
        assert document.token_bytes.sum() == len(text.encode())
    (rare,) = load(["a𝄞ß"]).documents
    assert rare.token_bytes.tolist() == [1, 4, 0, 0, 0, 2, 0]  # bytes that were not merged are tokens of their own
    (plain,) = load(["".join(map(chr, range(32, 127)))]).documents
    decoded = [len(tokenizer.decode([token])) for token in plain.ids]
    assert plain.token_bytes.tolist() == decoded


def test_bytes_where_the_tokenizer_drops_text(load):
    words = Tokenizer(models.WordLevel({"?": 0, "ab": 1, "cd": 2}, unk_token="?"))
    words.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    (document,) = load(["  AB \n cd é  "], fast).documents
    assert document.ids.tolist() == [1, 2, 0]
    assert document.token_bytes.tolist() == [4, 5, 5]
    with pytest.raises(PatchError, match="document 1 has no tokens"):
        load(["ab", "​"], make_blind(fast))


def make_blind(tokenizer):
    """A tokenizer that drops zero-width spaces."""
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("​", "")
    return tokenizer


def test_a_slow_tokenizer_tells_no_bytes(load):
    for _ in range(2):  # made, then read from the cache
        (document,) = load(["aé"], ByT5Tokenizer()).documents
        assert (document.ids.tolist(), document.token_bytes) == ([100, 198, 172], None)


def test_long_text_without_warning_or_cut(load, tokenizer):
    limited = train_tokenizer(TEXTS, vocab_size=300)
    limited.model_max_length = 8
    messages = []

    class Listener(transformers.logging.logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    listener = Listener()
    transformers.logging.add_handler(listener)
    try:
        (document,) = load([long_text(500)], limited).documents
    finally:
        transformers.logging.remove_handler(listener)
    assert len(document.ids) > 500
    assert messages == []


def test_the_cache_is_read_and_misses_what_changed(load, calls, tokenizer, tmp_path):
    first = load(TEXTS)
    assert calls == TEXTS
    again = load(TEXTS, max_tokens=5, min_tokens=1)
    assert calls == TEXTS
    assert ids_of(again) == [ids[:5] for ids in ids_of(first)]
    assert [d.token_bytes.tolist() for d in load(TEXTS).documents] == [d.token_bytes.tolist() for d in first.documents]
    tokenizer(["x"], truncation=True, max_length=4)  # leaves a mark in the tokenizer that changes no ids here
    del calls[:]
    load(TEXTS)
    assert calls == []
    load([*TEXTS[:2], TEXTS[2] + "."])
    load(["".join(TEXTS[:2]), TEXTS[2]])
    assert len(calls) == 5
    del calls[:]
    other = train_tokenizer(TEXTS, vocab_size=280)
    assert ids_of(load(TEXTS, other)) != ids_of(first)
    assert calls == TEXTS
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-3] + b"\x07\x07\x07"])
def test_a_damaged_cache_file_is_made_anew(load, calls, tmp_path, damage):
    expected = ids_of(load(TEXTS))
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    del calls[:]
    assert ids_of(load(TEXTS)) == expected
    assert calls == TEXTS
    assert file.read_bytes() == whole


def test_where_the_cache_is(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HFPOS_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(TEXTS, cache_dir=None)
    monkeypatch.delenv("HFPOS_CACHE")
    load(TEXTS, cache_dir=None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load(TEXTS, cache_dir=None)
    for folder in ("named", "xdg/hfpos/tokens", "home/.cache/hfpos/tokens"):
        assert [path.suffix for path in (tmp_path / folder).iterdir()] == [".safetensors"]


def test_a_cache_that_cannot_be_written_is_a_warning(load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot keep tokenised text") as caught:
        loaded = load(TEXTS, cache_dir=tmp_path / "file")
    assert caught[0].filename == __file__.replace(".pyc", ".py")
    assert ids_of(loaded) == ids_of(load(TEXTS))


def test_cutting_and_filtering(load):
    texts = [long_text(30), long_text(3), long_text(60)]
    whole = ids_of(load(texts))
    sizes = [len(ids) for ids in whole]
    assert ids_of(load(texts, max_tokens=10)) == [ids[:10] for ids in whole]
    filtered = load(texts, min_tokens=sizes[0], max_tokens=10)  # the minimum is of the whole document
    assert names_of(filtered) == ["document 0", "document 2"]
    assert [(each.document, each.reason) for each in filtered.skipped] == [
        ("document 1", f"{sizes[1]} tokens, fewer than min_tokens={sizes[0]}")
    ]
    assert filtered.preparation == {"min_tokens": sizes[0], "max_tokens": 10}

    blocks = load(texts, block_tokens=20)
    assert names_of(blocks)[:2] == ["document 0[0]", "document 0[1]"]
    assert [each.document for each in blocks.skipped] == ["document 1"]
    last = [index for index, name in enumerate(names_of(blocks)) if name.startswith("document 2")]
    assert len(last) == sizes[2] // 20
    assert sum((ids_of(blocks)[index] for index in last), []) == whole[2][: len(last) * 20]
    joined = torch.cat([blocks.documents[index].token_bytes for index in last])
    assert joined.tolist() == load(texts).documents[2].token_bytes[: len(joined)].tolist()


def test_choosing_documents(load):
    texts = [f"text number {index}" for index in range(30)]
    assert names_of(load(texts, max_documents=2)) == ["document 0", "document 1"]
    drawn = names_of(load(texts, max_documents=10, seed=1))
    assert len(drawn) == 10
    assert drawn == sorted(drawn, key=lambda name: int(name.split()[1])) != names_of(load(texts, max_documents=10))
    assert drawn == names_of(load(texts, max_documents=10, seed=1)) != names_of(load(texts, max_documents=10, seed=2))
    assert len(load(texts, max_documents=99, seed=1).documents) == 30


def test_the_hash_is_of_ids_and_borders(load):
    assert load(["ab", "cd"]).sha256 == load(["ab", "cd"]).sha256 != load(["cd", "ab"]).sha256
    blocks, whole = load(["abcd"], block_tokens=1), load(["abcd"])
    assert blocks.sha256 != whole.sha256
    ids = whole.documents[0].ids
    assert whole.sha256 == hashlib.sha256(len(ids).to_bytes(8, "little") + ids.numpy().tobytes()).hexdigest()


def test_arguments_at_their_defaults_are_not_in_the_record(load):
    assert load(TEXTS).preparation == {}
    assert set(load(TEXTS, skip_bad=True, max_documents=2, seed=0).preparation) == {
        "skip_bad",
        "max_documents",
        "seed",
    }
