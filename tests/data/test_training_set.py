"""What is trained on: every kind of source, which documents, how often, in what order, and what is refused."""

import gzip
import hashlib
import json
import pickle
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from hfpos import PatchError
from hfpos.data import Source, training_set
from hfpos.data.sources import read_source
from tests.data.byte_tokens import BYTES, END


TEXTS = ["the first document", "a second, longer one: äöü", "third", "and the very last of them all"]


def texts_of(data):
    """Every sample as text."""
    return [BYTES.decode(data[index]["input_ids"]) for index in range(len(data))]


def digest_of(data):
    seen = hashlib.sha256()
    for sample in data:
        for name in sorted(sample):
            seen.update(sample[name].numpy().tobytes())
    return seen.hexdigest()


@pytest.fixture
def make(tmp_path):
    """`training_set` with a tokenizer and a cache of the test's own."""
    defaults = {"length": 8, "cache_dir": tmp_path / "cache"}
    return lambda sources, tokenizer=BYTES, **options: training_set(sources, tokenizer, **(defaults | options))


def write_parquet(path, rows, **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def test_every_source_gives_the_same_samples(make, tmp_path, monkeypatch):
    rows = [{"id": number, "body": text} for number, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name in ("plain", "parts", "prose", "hub"):
        (tmp_path / name).mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "plain" / f"{number}.txt").write_text(text, encoding="utf-8")
        (tmp_path / "prose" / f"train-{number}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_bytes(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    write_parquet(tmp_path / "rows.parquet", rows, row_group_size=3)
    write_parquet(tmp_path / "parts" / "train-0.parquet", rows[:3])
    write_parquet(tmp_path / "parts" / "train-1.parquet", rows[3:])
    (tmp_path / "parts" / "README.md").write_text("about the data")
    dataset = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    body = {"text_column": "body"}
    expected = digest_of(make([Source(TEXTS)]))
    for source in [
        Source(tmp_path / "plain"),
        Source(str(tmp_path / "rows.jsonl"), **body),
        Source(tmp_path / "rows.jsonl.gz", **body),
        Source(tmp_path / "rows.parquet", **body),
        Source(tmp_path / "rows.parquet", **body, streaming=True),
        Source(tmp_path / "parts", **body, streaming=True),
        Source(str(tmp_path / "parts"), **body, streaming=True, split="train"),
        Source(tmp_path / "parts", **body, split="train"),
        Source(tmp_path / "prose", split="train", streaming=True),  # a document a file, not a line
        Source(dataset, **body),
        Source(dataset["body"]),
        Source(rows, **body),
        Source(dataset.to_iterable_dataset(), **body),
        Source(datasets.DatasetDict(train=dataset, test=dataset.select([0])), **body, split="train"),
        Source(TEXTS, max_tokens=10_000),
    ]:
        assert digest_of(make([source])) == expected, source


def test_samples_do_not_depend_on_when_or_how_they_are_asked_for(make):
    sources = [Source(TEXTS, long_tokens=20, long_times=3)]
    data = make(sources)
    again = pickle.loads(pickle.dumps(data))
    assert digest_of(data) == digest_of(again) == digest_of(make(sources))
    assert digest_of(data) != digest_of(make(sources, seed=1))
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=2)
    for index, batch in enumerate(loader):
        for row, sample in enumerate(range(2 * index, min(2 * index + 2, len(data)))):
            assert {name: tensor[row].tolist() for name, tensor in batch.items()} == {
                name: tensor.tolist() for name, tensor in data[sample].items()
            }
    assert data[-1]["input_ids"].tolist() == data[len(data) - 1]["input_ids"].tolist()
    with pytest.raises(IndexError):
        data[len(data)]


def test_the_same_in_every_process_and_version(make):
    """Python's hashes differ from run to run; a number that changes here changes everybody's order."""
    data = make([Source(TEXTS, weight=1), Source(TEXTS[:2], weight=2)])
    assert digest_of(data) == "b48ca29d6e9696703e53e6b6d3bf1f85a868c71bc0069cd5015bbc578b4c3a0b"


@pytest.mark.parametrize("packing", ["documents", "joined"])
def test_an_epoch_has_every_token_but_the_rest(make, packing):
    data = make([Source(TEXTS)], packing=packing, length=5)
    total = sum(len(text.encode()) + 1 for text in TEXTS)
    assert len(data) == total // 5
    seen = Counter(token for sample in data for token in sample["input_ids"].tolist())
    everything = Counter(token for text in TEXTS for token in [*BYTES(text).input_ids, END])
    assert (everything - seen).total() == total % 5
    assert not seen - everything


def test_documents_are_chosen_and_long_ones_seen_more_often(make):
    texts = ["a" * 4, "b" * 8, "c" * 12, "d" * 3]
    data = make([Source(texts, min_tokens=4, long_tokens=8, long_times=3)], packing="blocks", length=4)
    assert Counter(texts_of(data)) == {"aaaa": 1, "bbbb": 2 * 3, "cccc": 3 * 3}
    summary = data.summary()
    assert (summary["documents"], summary["tokens"], summary["documents_used"]) == (4, 27, 3)
    assert summary["samples"] == len(data) == 16


def test_weights(make):
    small, large, plain = ["s" * 40], ["L" * 40] * 3, ["p" * 40] * 2
    sources = [Source(small, weight=1), Source(large, weight=1), Source(plain)]
    data = make(sources, packing="blocks", length=4)
    assert Counter(texts_of(data)) == {"ssss": 20, "LLLL": 20, "pppp": 20}
    assert [row["samples"] for row in data.summary()["sources"]] == [20, 20, 20]
    assert [row["samples_of_text"] for row in data.summary()["sources"]] == [10, 30, 20]
    for start in range(0, 60, 15):  # evenly mixed
        assert set(Counter(texts_of(data)[start : start + 15]).values()) <= {3, 4, 5, 6, 7}
    assert Counter(
        texts_of(make([Source(small, weight=0.1), Source(large, weight=0.9)], packing="blocks", length=4))
    ) == {
        "ssss": 4,
        "LLLL": 36,
    }


def test_a_repeated_source_is_seen_whole_each_time_and_in_another_order(make):
    letters = [letter * 4 for letter in "abcdefghij"]
    data = make([Source(letters, weight=3), Source(["X" * 80], weight=1)], packing="blocks", length=4)
    seen = [text for text in texts_of(data) if text != "XXXX"]
    assert len(seen) == 23  # three quarters of 30, rounded up
    rounds = [seen[:10], seen[10:20]]
    assert all(sorted(turn) == letters for turn in rounds)
    assert rounds[0] != rounds[1]
    assert len(set(seen[20:])) == 3
    part = [
        make([Source(letters, weight=1), Source(["X" * 4], weight=1)], packing="blocks", length=4, seed=seed)
        for seed in (1, 2)
    ]
    halves = [{text for text in texts_of(data) if text != "XXXX"} for data in part]
    assert len(halves[0]) in (5, 6)
    assert halves[0] != halves[1]


def test_no_sample_mixes_sources(make):
    data = make([Source(["a" * 30, "b" * 9], weight=1), Source(["X" * 50], weight=3)], length=8)
    for text in texts_of(data):
        assert len({letter.isupper() for letter in text.replace("</s>", "")}) <= 1


def test_where(make, tmp_path):
    (tmp_path / "book.txt").write_text("x" * 10_000)
    data = make([Source(tmp_path / "book.txt")], length=4096, packing="blocks")
    assert sorted(data.where(index) for index in range(2)) == [
        "book.txt, tokens 0 to 4,095",
        "book.txt, tokens 4,096 to 8,191",
    ]
    first, second = (make([Source(["ab"] * 5), Source(["c" * 14])], length=15).where(index) for index in range(2))
    named = {first, second}
    assert "list of 1: document 0, tokens 0 to 13" in named
    (packed,) = named - {"list of 1: document 0, tokens 0 to 13"}
    assert packed.startswith("list of 5: document ")
    assert packed.endswith("; and 2 more")
    assert packed.count("tokens 0 to 1") == 3
    ends = make([Source(["c" * 8])], length=3, packing="joined")
    assert {ends.where(index) for index in range(3)} >= {"document 0, tokens 6 to 7"}


def test_the_digest_tells_texts_apart(make):
    whole = make([Source(TEXTS)]).summary()["sha256"]
    assert whole == make([Source(tuple(TEXTS), min_tokens=6)], length=3, seed=4).summary()["sha256"]
    assert whole != make([Source(TEXTS[::-1])]).summary()["sha256"]
    json.dumps(make([Source(TEXTS, weight=2.0)]).summary())


def test_bad_rows_are_listed_where_asked_for(make, tmp_path):
    rows = [{"text": "good text here"}, {"text": None}, {"text": " "}, {"text": "also good"}]
    write_parquet(tmp_path / "rows.parquet", rows)
    with pytest.raises(PatchError, match=r"rows.parquet row 2 has nothing in 'text'"):
        make([Source(tmp_path / "rows.parquet")])
    (tmp_path / "rows.jsonl").write_text('{"text": "good text here"}\n{"te\n')
    data = make([Source(tmp_path / "rows.parquet"), Source(tmp_path / "rows.jsonl")], skip_bad=True)
    skipped = [row["skipped"] for row in data.summary()["sources"]]
    assert [each["document"] for each in skipped[0]] == ["rows.parquet:2", "rows.parquet:3"]
    assert "line 2 is not JSON" in skipped[1][0]["reason"]
    with pytest.raises(PatchError, match="row 2 has nothing"):  # although it is tokenised by now
        make([Source(tmp_path / "rows.parquet")])


DATA = datasets.Dataset.from_dict({"body": ["a", "b"], "id": [1, 2]})


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([Source(TEXTS)], {"tokenizer": None}, "missing tokenizer"),
        ([Source(TEXTS)], {"tokenizer": "gpt2"}, "the tokenizer is a str"),
        ([Source(TEXTS)], {"length": 1}, "length=1; expected a whole number of at least 2"),
        ([Source(TEXTS)], {"length": 8.0}, r"length=8\.0"),
        ([Source(TEXTS)], {"seed": -1}, "seed=-1"),
        ([Source(TEXTS)], {"packing": "block"}, "unknown packing 'block'; did you mean 'blocks'"),
        ([], {}, r"sources=\[\]; expected a list"),
        (Source(TEXTS), {}, r"expected a list of hfpos\.data\.Source"),
        (["stdlib"], {}, r"sources=\['stdlib'\]"),
        ([Source(TEXTS)], {"length": 100}, "list of 4 has 84 tokens to train on, fewer than one sample of 100"),
        ([Source(TEXTS)], {"length": 30, "packing": "blocks"}, "30 tokens, as a sample.*longest, document 3, has 29"),
        ([Source(TEXTS, min_tokens=50)], {}, "50 tokens, as min_tokens needs; the longest, document 3, has 29"),
        ([Source(TEXTS), Source(["x"])], {}, "list of 1 has 2 tokens"),
        (
            [Source(TEXTS, weight=1), Source(TEXTS, weight=1e-6)],
            {},
            "weight=1e-06 gives list of 4 none of the 20 samples",
        ),
        ([Source([])], {}, "no text in list of 0"),
        ([Source([""])], {"skip_bad": True}, "no text in list of 1; .*1 cannot be, the first: document 0 is empty"),
        ([Source(iter(TEXTS))], {}, "list_iterator can be read only once"),
        ([Source(DATA.to_iterable_dataset(), max_tokens=5, text_column="body")], {}, "must be read whole"),
        ([Source(DATA)], {}, "no column 'text', only body, id"),
        ([Source(DATA.to_iterable_dataset())], {}, "no column 'text', only body, id"),
        ([Source(DATA, streaming=True)], {}, "streaming=True was given with Dataset of 2"),
        ([Source("stdlib", streaming=True)], {}, "streaming=True was given with stdlib"),
        ([Source("stdlib", split="test")], {}, "split='test' was given with stdlib"),
        ([Source("./nowhere.parquet")], {}, "no text at ./nowhere.parquet"),
        ([Source(7)], {}, "cannot read documents from a int"),
    ],
)
def test_errors(make, sources, options, message):
    with pytest.raises(PatchError, match=message) as caught:
        make(sources, **options)
    assert "\n" not in str(caught.value)


def test_bad_parquet(make, tmp_path):
    path = tmp_path / "rows.parquet"
    write_parquet(path, [{"body": "x", "id": 3}])
    with pytest.raises(PatchError, match="no column 'text', only body, id; say which one"):
        make([Source(path)])
    with pytest.raises(PatchError, match="row 1 has a int in 'id'"):
        make([Source(path, text_column="id")])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(PatchError, match="cannot read .*rows.parquet after row 0.*expected a whole parquet file"):
        make([Source(path, text_column="body")])


def test_a_folder_that_is_no_dataset(make, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatchError, match=r"empty' is no folder that datasets can load with split=None") as caught:
        make([Source(tmp_path / "empty", streaming=True)])
    assert "\n" not in str(caught.value)


def test_the_standard_library_in_two_parts():
    names = {part: {name for name, _ in read_source("stdlib", "text", part)} for part in (None, "train", "held_out")}
    assert names["train"] | names["held_out"] == names[None]
    assert not names["train"] & names["held_out"]
    assert names["held_out"]
    with pytest.raises(PatchError, match="expected train or held_out"):
        next(read_source("stdlib", "text", "test"))


def test_the_configuration_of_a_dataset_stands_behind_a_colon(tmp_path):
    for name in ("old", "new"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"the {name} text"}) + "\n", encoding="utf-8")
    header = "---\nconfigs:\n- config_name: old\n  data_files: old.jsonl\n- config_name: new\n  data_files: new.jsonl\n---\n"
    (tmp_path / "README.md").write_text(header, encoding="utf-8")
    for name in ("old", "new"):
        assert [text for _, text in read_source(f"{tmp_path}:{name}", "text", "train")] == [f"the {name} text"]
    with pytest.raises(PatchError, match="that datasets can load"):
        next(read_source(f"{tmp_path}:other", "text", "train"))
