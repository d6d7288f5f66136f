"""Collators: plain batches, and positions with jumps that a model must not take for packed documents."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.data import DataLoader
from transformers.integrations import flex_attention as stock_flex

import hfpos
from hfpos import PatchError
from hfpos.data.collators import Collator, PoseCollator, RandomPositionCollator
from tests.pairs import checkpointing
from tests.tiny import tiny


LENGTH, TARGET = 16, 64
# dwzhu-pku/PoSE@a3d4ba8 src/train_pose.py, window 16, target 64: first and last position of each run of consecutive ones
AUTHORS = [[(0, 6), (33, 41)], [(0, 0), (33, 47)], [(0, 7), (45, 52)], [(0, 4), (53, 63)], [(0, 7), (14, 21)]]
# train_preprocess_function_randomized there
AUTHORS_RANDOM = [
    [2, 3, 4, 6, 9, 13, 23, 25, 32, 34, 37, 41, 52, 58, 60, 63],
    [2, 3, 7, 8, 9, 14, 18, 25, 26, 34, 35, 36, 37, 54, 62, 63],
]


def sample(number=0, length=LENGTH):
    ids = np.random.default_rng(number).integers(3, 100, length)
    return {"input_ids": ids.tolist(), "labels": ids.tolist()}


def draws(collator, count=2000, length=LENGTH):
    return collator([sample(i, length) for i in range(count)])["position_ids"]


def is_pose(positions, chunks):
    """Whether positions (L,) are runs as PoSE's are; two chunks whose skips are equal look like one."""
    jumps = positions.diff().ne(1).nonzero().flatten() + 1
    sizes = torch.tensor([0, *jumps.tolist(), len(positions)]).diff()
    at_most = -(-len(positions) // chunks)  # for two chunks, which are never merged where there is a jump
    short = chunks > 2 or len(jumps) == 0 or sizes[0] <= at_most
    return bool(positions[0] == 0 and positions.diff().min() >= 1 and len(jumps) < chunks and short)


def test_plain_batch():
    documents = {"position_ids": [0, 1, 2, 0]}
    batch = Collator()(
        [{"input_ids": np.array([1, 2, 3, 4]), "labels": torch.tensor([1, 2, -100, 4])} | documents] * 3
    )
    assert {name: (row.dtype, row.shape) for name, row in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids"), (torch.int64, (3, 4))
    )
    assert batch["labels"][2].tolist() == [-100, 2, -100, 4]  # nothing predicts the first
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 0]


def test_counted_positions_only_where_there_are_none():
    plain, packed = sample(0, 4), sample(0, 4) | {"position_ids": [0, 1, 0, 1]}
    assert Collator(counted=True)([plain, plain])["position_ids"].tolist() == [[0, 1, 2, 3]] * 2
    assert Collator(counted=True)([packed])["position_ids"].tolist() == [[0, 1, 0, 1]]
    assert "position_ids" not in Collator()([plain])
    assert plain == sample(0, 4)


@pytest.mark.parametrize("chunks", [2, 3, 5])
@pytest.mark.parametrize(("length", "target"), [(16, 64), (7, 8), (15, 15), (5, 1000)])
def test_pose_structure(chunks, length, target):
    found = draws(PoseCollator(target, chunks=chunks), 300, length)
    assert all(is_pose(row, chunks) for row in found)
    assert found.max() <= target - 1
    assert (found == torch.arange(length)).all() or target > length


def test_the_authors_samples_have_that_structure():
    for runs in AUTHORS:
        row = torch.cat([torch.arange(low, high + 1) for low, high in runs])
        assert len(row) == LENGTH
        assert is_pose(row, 2)
    assert not is_pose(torch.tensor([0, 1, 2, 9]), 2)  # the first chunk is at most half
    assert not is_pose(torch.tensor([0, 5, 6, 9]), 2)


def test_pose_reaches_everything():
    found = draws(PoseCollator(TARGET), 4000)
    skips = found[:, -1] - (LENGTH - 1)
    assert sorted(skips.unique().tolist()) == list(range(TARGET - LENGTH + 1))
    assert abs(skips.double().mean() - (TARGET - LENGTH) / 2) < 1  # uniform: 24, with a standard error of 0.22
    firsts = found[skips > 0].diff().ne(1).int().argmax(1) + 1
    assert sorted(firsts.unique().tolist()) == list(range(1, LENGTH // 2 + 1))
    assert abs(firsts.double().mean() - 4.5) < 0.15


def test_several_skips_are_uniform_and_sorted():
    skips = draws(PoseCollator(TARGET, chunks=5), 3000)[:, -1] - (LENGTH - 1)
    assert abs(skips.double().mean() - 48 * 4 / 5) < 0.6  # the largest of four


def test_random_positions():
    found = draws(RandomPositionCollator(TARGET))
    expected = torch.tensor(AUTHORS_RANDOM)
    for rows in (found, expected):
        assert rows.min() >= 0
        assert rows.max() <= TARGET - 1
        assert rows.diff().min() >= 1
    assert abs(found.double().mean() - (TARGET - 1) / 2) < 0.5
    assert torch.bincount(found.flatten(), minlength=TARGET).min() > 2000 * LENGTH / TARGET * 0.8
    assert draws(RandomPositionCollator(LENGTH), 3).equal(torch.arange(LENGTH).expand(3, -1))


@pytest.mark.parametrize("kind", [PoseCollator, RandomPositionCollator])
def test_draws_depend_on_tokens_seed_and_epoch_only(kind):
    samples = [sample(i) for i in range(8)]
    whole = kind(TARGET)(samples)
    split = [kind(TARGET)(samples[i : i + 2]) for i in (6, 2, 0, 4)]  # other processes, other order
    assert torch.cat([split[i]["position_ids"] for i in (2, 1, 3, 0)]).equal(whole["position_ids"])
    assert not kind(TARGET, seed=1)(samples)["position_ids"].equal(whole["position_ids"])
    collator = kind(TARGET)
    collator.set_epoch(1)
    later = collator(samples)["position_ids"]
    assert not later.equal(whole["position_ids"])
    assert collator(samples)["position_ids"].equal(later)
    collator.set_epoch(0)
    assert collator(samples)["position_ids"].equal(whole["position_ids"])
    assert all(row.dtype == torch.int64 for row in whole.values())
    assert whole["attention_mask"].shape == (8, LENGTH)
    assert whole["attention_mask"].all()
    assert whole["labels"][:, 1:].equal(torch.tensor([each["labels"][1:] for each in samples]))


def test_workers_that_live_on_learn_of_the_epoch():
    samples, collator = [sample(i) for i in range(4)], PoseCollator(TARGET)
    loader = DataLoader(samples, 2, collate_fn=collator, num_workers=1, persistent_workers=True)
    found = []
    for epoch in (0, 1):
        collator.set_epoch(epoch)
        found.append(torch.cat([batch["position_ids"] for batch in loader]))
        assert found[-1].equal(collator(samples)["position_ids"])
    assert not found[0].equal(found[1])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "0 samples with nothing"),
        ([{"input_ids": [1, 2]}], "expected input_ids, labels"),
        ([{"input_ids": [1], "labels": [1], "attention_mask": [1]}], "attention_mask.*drop other columns"),
        ([sample(), sample() | {"position_ids": list(range(LENGTH))}], "in all or none"),
        ([sample(0, 3), sample(0, 4)], r"\(3,\), \(4,\).*expected one length"),
        ([{"input_ids": [[1]], "labels": [[1]]}], "expected one length"),
        ([sample(0, TARGET + 1)], "65 tokens do not fit into target_length=64"),
        ([sample() | {"position_ids": [*range(8), *range(8)]}], "packed into one sample"),
        ([sample() | {"position_ids": list(range(1, LENGTH + 1))}], "other than 0 to 15"),
        ([sample(0, 2)], "2 tokens cannot be cut into 3 chunks"),
    ],
)
def test_bad_samples(samples, message):
    with pytest.raises(PatchError, match=message):
        PoseCollator(TARGET, chunks=3)(samples)


@pytest.mark.parametrize(
    "bad", [{"target_length": 1}, {"chunks": 1}, {"chunks": 2.5}, {"seed": -1}, {"target_length": "4k"}]
)
def test_bad_settings(bad):
    with pytest.raises(PatchError, match=f"{next(iter(bad))}=.*whole number"):
        PoseCollator(**{"target_length": TARGET} | bad)


def test_plain_position_ids_are_replaced():
    given = [sample() | {"position_ids": list(range(LENGTH))}]
    assert PoseCollator(TARGET)(given)["position_ids"].equal(PoseCollator(TARGET)([sample()])["position_ids"])


@pytest.fixture
def uncompiled(monkeypatch):
    """flex_attention as it is written: compiling it takes 30 seconds."""
    monkeypatch.setattr(stock_flex, "WrappedFlexAttention", lambda training: lambda: flex_attention)
    monkeypatch.setattr(
        "transformers.masking_utils.create_block_mask",
        lambda *args, _compile=None, **kwargs: create_block_mask(*args, **kwargs),
    )
    monkeypatch.setattr("hfpos.attention.flex._compiled", lambda: flex_attention)


def built(name, backend):
    stock = "flex_attention" if backend == "flex" else backend
    if name == "gpt2-rope":
        return hfpos.patch(tiny("gpt2", n_positions=LENGTH, attn_implementation=stock), "rope")
    model = tiny("llama", max_position_embeddings=LENGTH, attn_implementation=stock)
    if name == "llama-yarn":
        hfpos.patch(model, "yarn", target_length=TARGET)
    if name == "llama-alibi":
        hfpos.patch(model, "alibi", backend=backend)
    return model


MODELS = ("llama", "llama-yarn", "llama-alibi", "gpt2-rope")
PLACES = [(name, backend) for name in MODELS for backend in ("eager", "sdpa", "flex")]
PLACES.remove(("gpt2-rope", "flex"))  # Transformers refuses it


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize(("name", "backend"), PLACES)
def test_later_chunks_see_earlier_ones(name, backend, uncompiled):
    model = built(name, backend)
    samples = [sample(i) for i in range(2)]
    for training in [False] if backend == "flex" else [False, True]:  # flex has no backward on CPU
        if training:
            checkpointing(model)
        for chunks in (2, 3, 4, 5):
            batch = PoseCollator(TARGET, chunks=chunks)(samples)
            with torch.set_grad_enabled(training):
                moved = logits(model, batch) - logits(model, batch, first=1)
            assert moved[:, -1].abs().max(-1).values.min() > 1e-5


def test_without_the_mask_they_would_not():
    """What the mask is for; where this fails, Transformers has stopped reading jumps as borders."""
    model, batch = built("llama", "sdpa"), PoseCollator(TARGET)([sample()])
    del batch["attention_mask"]
    with torch.no_grad():
        moved = logits(model, batch) - logits(model, batch, first=1)
    assert not moved[0, -1].any()


def logits(model, batch, first=None):
    """Logits of `batch`, or of one whose rows begin with the token `first`."""
    ids = batch["input_ids"].clone()
    if first is not None:
        ids[:, 0] = first
    torch.manual_seed(0)  # of dropout
    given = {name: row for name, row in batch.items() if name not in ("input_ids", "labels")}
    return model(input_ids=ids, use_cache=False, **given).logits
