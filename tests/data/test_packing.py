"""Documents cut into samples: which tokens, positions and labels, by hand and through a model."""

import numpy as np
import pytest
import torch

from hfpos import PatchError
from hfpos.data import Source, train_tokenizer, training_set
from hfpos.data.packing import Layout, assemble, check_packing, laid_sizes
from tests.data.byte_tokens import BYTES, END, ids
from tests.tiny import tiny


def rows(sample):
    return {name: tensor.tolist() for name, tensor in sample.items()}


def test_documents_by_hand():
    layout = Layout(np.array([1, 0, 2]), np.array([3, 6, 4]), length=5)
    assert layout.samples == 2  # of 13 tokens
    assert [layout.pieces(sample) for sample in range(2)] == [[(1, 0, 3), (0, 0, 2)], [(0, 2, 6), (2, 0, 1)]]
    pieces = [np.array([11, 12, END]), np.array([21, 22])]
    assert rows(assemble(pieces, "documents")) == {
        "input_ids": [11, 12, END, 21, 22],
        "labels": [-100, 12, END, -100, 22],
        "position_ids": [0, 1, 2, 0, 1],
    }
    plain = [11, 12, END, 21, 22]
    assert (
        rows(assemble(pieces, "joined")) == rows(assemble(pieces, "blocks")) == {"input_ids": plain, "labels": plain}
    )
    assert all(tensor.dtype == torch.int64 for tensor in assemble(pieces, "documents").values())


@pytest.mark.parametrize("length", [2, 3, 7, 10, 64])
def test_any_sizes_and_length_cover_the_row_once(length):
    draw = np.random.default_rng(length)
    sizes = draw.integers(1, 15, size=40)
    layout = Layout(draw.permutation(40), sizes, length)
    row = [(document, place) for document, size in zip(layout.documents, sizes, strict=True) for place in range(size)]
    for sample in range(layout.samples):
        found = [(document, place) for document, start, stop in layout.pieces(sample) for place in range(start, stop)]
        assert found == row[sample * length : (sample + 1) * length]
    assert layout.samples == len(row) // length


def test_sizes():
    lengths = np.array([3, 4, 9])
    assert laid_sizes(lengths, "documents", 4, end_of_text=False).tolist() == [3, 4, 9]
    assert laid_sizes(lengths, "joined", 4, end_of_text=True).tolist() == [4, 5, 10]
    assert laid_sizes(lengths, "blocks", 4, end_of_text=True).tolist() == [0, 4, 8]


def test_unknown_packing():
    with pytest.raises(PatchError, match="unknown packing 'document'; did you mean 'documents'"):
        check_packing("document")


def test_a_model_keeps_packed_documents_apart(tmp_path):
    data = training_set(
        [Source(["abcdefgh", "ijk", "lmnopqr", "stuvwxyz", "a"])], BYTES, length=16, cache_dir=tmp_path
    )
    model = tiny("llama", vocab_size=258)
    for index in range(len(data)):
        sample = {name: tensor[None] for name, tensor in data[index].items()}
        packed = model(**sample, use_cache=False)
        starts = [*np.flatnonzero(data[index]["position_ids"] == 0), 16]
        total, count = 0.0, 0
        for start, stop in zip(starts[:-1], starts[1:], strict=True):
            alone = model(input_ids=sample["input_ids"][:, start:stop], use_cache=False).logits
            torch.testing.assert_close(packed.logits[:, start:stop], alone)
            labels = sample["input_ids"][0, start + 1 : stop]
            total += torch.nn.functional.cross_entropy(alone[0, :-1], labels, reduction="sum").item()
            count += len(labels)
        assert len(starts) > 2
        assert packed.loss.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("packing", ["documents", "joined"])
def test_every_document_ends_with_the_end_of_text(packing, tmp_path):
    texts = ["abc", "defgh", "i"]
    data = training_set([Source(texts)], BYTES, length=12, packing=packing, cache_dir=tmp_path)
    assert len(data) == 1
    row = data[0]["input_ids"].tolist()
    assert sorted(BYTES.decode(row).split("</s>")) == ["", "abc", "defgh", "i"]
    if packing == "documents":
        starts = np.flatnonzero(data[0]["position_ids"] == 0)
        assert all(start == 0 or row[start - 1] == END for start in starts)


def test_a_tokenizer_without_end_of_text(tmp_path):
    tokenizer = train_tokenizer([], vocab_size=258)
    tokenizer.eos_token = None
    data = training_set([Source(["ab", "cd"])], tokenizer, length=4, cache_dir=tmp_path)
    assert data[0]["input_ids"].tolist() in (ids("abcd"), ids("cdab"))
    assert data[0]["position_ids"].tolist() == [0, 1, 0, 1]


def test_blocks_lie_within_one_document(tmp_path):
    data = training_set(
        [Source(["abcdefghijk", "xyz", "lmnop"])], BYTES, length=4, packing="blocks", cache_dir=tmp_path
    )
    assert sorted(BYTES.decode(sample["input_ids"]) for sample in data) == ["abcd", "efgh", "lmno"]
    assert all(set(sample) == {"input_ids", "labels"} for sample in data)
    assert data.summary()["documents_used"] == 2
