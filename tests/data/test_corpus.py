"""Reading text, splitting it by file, and turning it into ids."""

import gzip
import json
import sysconfig

import pytest

from hfpos import PatchError
from hfpos.data import (
    Document,
    blocks,
    read_documents,
    split_documents,
    standard_library,
    tokenize,
    train_tokenizer,
)


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_standard_library_is_long_readable_text_of_the_library_alone():
    documents = standard_library()
    names = [document.name for document in documents]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if name.startswith(("site-packages/", "test/", "encodings/", "lib2to3/"))]
    assert "stringprep.py" not in names  # a table of numbers
    assert min(len(document.text) for document in documents) >= 4_000
    assert sum(len(document.text) for document in documents) > 2_000_000


def test_standard_library_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(PatchError, match="give your own text"):
        standard_library()


def test_reads_every_kind_of_file(tmp_path):
    (tmp_path / "b.txt").write_text("prose ☺\n", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.txt").write_text("hidden", encoding="utf-8")
    (tmp_path / "empty.md").write_text(" \n", encoding="utf-8")
    rows = [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]
    write_jsonl(tmp_path / "c.jsonl", rows)
    write_jsonl(tmp_path / "d.jsonl.gz", rows[:1])
    assert [(document.name, document.text) for document in read_documents(tmp_path)] == [
        ("b.txt", "prose ☺\n"),
        ("c.jsonl:1", "one"),
        ("c.jsonl:2", "two"),
        ("d.jsonl.gz:1", "one"),
        ("sub/a.py", "x = 1\n"),
    ]
    assert read_documents(str(tmp_path / "b.txt")) == [Document("b.txt", "prose ☺\n")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"\n', r"broken.jsonl line 2 is not JSON"),
        ("fields.jsonl", b'{"content": "a"}\n', r"line 1 has the fields \['content'\]"),
        ("number.jsonl", b'{"text": 3}\n', 'a string field "text"'),
        ("list.jsonl", b"[1]\n", "a list"),
        ("notgzip.jsonl.gz", b"plain", "cannot read"),
        ("picture.png", b"", "expected a file that ends in .txt"),
        ("blank.txt", b" \n", "no text in"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PatchError, match=message):
        read_documents(tmp_path / name)


def test_no_file_and_empty_folder(tmp_path):
    with pytest.raises(PatchError, match="check the path"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(PatchError, match="no text in"):
        read_documents(tmp_path)


def test_split_keeps_files_whole_and_follows_the_seed():
    documents = [Document(str(index), "x" * (index + 1)) for index in range(40)]
    train, held_out = split_documents(documents, held_out=0.2, seed=3)
    assert sorted((*train, *held_out), key=documents.index) == documents
    total = sum(len(document.text) for document in documents)
    assert 0.2 * total <= sum(len(document.text) for document in held_out) < 0.2 * total + 40
    assert split_documents(documents, held_out=0.2, seed=3) == (train, held_out)
    assert split_documents(documents, held_out=0.2, seed=4) != (train, held_out)


def test_split_of_few_documents():
    two = [Document("a", "x" * 10), Document("b", "y" * 1000)]
    train, held_out = split_documents(two, held_out=0.9)
    assert len(train) == len(held_out) == 1
    train, held_out = split_documents([Document("book", "abcdefghij")], held_out=0.2)
    assert (train, held_out) == ([Document("book (start)", "abcdefgh")], [Document("book (end)", "ij")])
    for documents, share in (([], 0.1), (two, 0), (two, 1.5)):
        with pytest.raises(PatchError, match="a share between 0 and 1"):
            split_documents(documents, held_out=share)


def test_tokenizer_round_trip_and_special_tokens(tmp_path):
    texts = ["for i in range(10):\n    print(i)\n"] * 3
    tokenizer = train_tokenizer(texts, vocab_size=270)
    assert len(tokenizer) == 270
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    text = "Ünïcode ☺\t\n  and  spaces"
    tokenizer.save_pretrained(tmp_path)
    (ids,) = tokenize(type(tokenizer).from_pretrained(tmp_path), [Document("", text)])
    assert tokenizer.decode(ids) == text
    assert ids == tokenize(train_tokenizer(texts, vocab_size=270), [Document("", text)])[0]  # the same every time
    with pytest.raises(PatchError, match="vocab_size=100"):
        train_tokenizer(texts, vocab_size=100)


def test_blocks_never_cross_documents():
    assert blocks([[1, 2, 3], [4, 5], [6]], 2) == [[1, 2], [4, 5]]
