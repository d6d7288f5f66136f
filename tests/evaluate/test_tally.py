"""Sums, curves, bits per byte and the bootstrap against the same written out with numpy and plain Python."""

import math

import numpy as np
import pytest
import torch

import hfpos
from hfpos.data.documents import TokenizedDocument
from hfpos.evaluate import LengthScore, PerplexityResult, perplexity
from hfpos.evaluate.tally import Tally, bucket_edges, score
from tests.tiny import tiny


def documents(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, (size,), generator=generator) for size in sizes]


def losses_of(model, row):
    with torch.no_grad():
        logits = model(row[None], use_cache=False).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, row[1:], reduction="none").numpy()


def test_curve_is_the_mean_loss_by_position():
    model, rows = tiny("llama", vocab_size=96), documents(100, 80)
    result = perplexity(model, rows, [40, 80]).by_length
    losses = [losses_of(model, row) for row in rows]
    for length, scored in result.items():
        assert scored.curve[0].start == 1
        assert scored.curve[-1].stop == length
        assert sum(bucket.tokens for bucket in scored.curve) == scored.tokens
        for bucket in scored.curve:
            # the loss of token t, which has t tokens before it, is losses[t - 1]
            expected = np.concatenate([each[bucket.start - 1 : bucket.stop - 1] for each in losses])
            assert bucket.tokens == len(expected)
            assert bucket.nll == pytest.approx(expected.mean(), rel=1e-5)
    assert {40, 64} <= {
        bucket.start for bucket in result[80].curve
    }  # divided at the other lengths and at the trained one


def test_perplexity_between_positions():
    model, rows = tiny("llama", vocab_size=96), documents(100, 90)
    scored = perplexity(model, rows, [64, 90]).by_length[90]
    expected = np.concatenate([losses_of(model, row)[63:89] for row in rows]).mean()
    assert scored.perplexity_between(64, 90) == pytest.approx(math.exp(expected), rel=1e-5)
    with pytest.raises(hfpos.PatchError, match="starts at 63"):
        scored.perplexity_between(63, 90)


def test_standard_error_is_that_of_resampled_documents():
    model, rows = tiny("llama", vocab_size=96), documents(*[60] * 12)
    found = perplexity(model, rows, [60]).by_length[60]
    means = np.array([losses_of(model, row).mean() for row in rows])
    generator = np.random.default_rng(5)
    resampled = [math.exp(generator.choice(means, len(means)).mean()) for _ in range(4000)]
    assert found.stderr == pytest.approx(np.std(resampled), rel=0.1)
    assert perplexity(model, rows, [60], seed=1).by_length[60].stderr != found.stderr
    assert perplexity(model, rows[:1], [60]).by_length[60].stderr is None


@pytest.mark.parametrize("stride", [None, 10])
@pytest.mark.parametrize("bos", ["none", "every-window"])
def test_bits_per_byte_counts_the_bytes_of_scored_tokens(stride, bos):
    model = tiny("llama", vocab_size=96, bos_token_id=1)
    sizes = [torch.arange(len(row)) % 5 + 1 for row in documents(40, 31)]
    rows = [
        TokenizedDocument(f"d{i}", row, size)
        for i, (row, size) in enumerate(zip(documents(40, 31), sizes, strict=True))
    ]
    found = perplexity(model, rows, [30], stride, bos=bos).by_length[30]
    first = 0 if bos == "every-window" else 1
    last = [29 if bos == "every-window" else 30] * 2 if stride is None else [40, 31]
    scored = sum(int(size[first:stop].sum()) for size, stop in zip(sizes, last, strict=True))
    assert found.bits_per_byte == pytest.approx(found.nll * found.tokens / math.log(2) / scored)
    mixed = [rows[0], TokenizedDocument("no bytes", rows[1].ids)]
    assert perplexity(model, mixed, [30], stride, bos=bos).by_length[30].bits_per_byte is None


def test_windows_weigh_alike_under_the_older_aggregate():
    tallies = []
    for losses in ([1.0, 1.0, 1.0], [4.0]):
        tallies.append(Tally())
        tallies[-1].add(torch.tensor(losses, dtype=torch.float64), 1, bucket_edges(8, []), None)
    assert score(tallies, bucket_edges(8, []), "tokens", 0).nll == pytest.approx(7 / 4)
    assert score(tallies, bucket_edges(8, []), "windows", 0).nll == pytest.approx(5 / 2)


def test_effective_context():
    def result(**values):
        return PerplexityResult({int(key[1:]): LengthScore(value, 0.0, 1, 1) for key, value in values.items()})

    falls = result(l8=9.0, l16=8.0, l32=8.07, l64=9.0)
    assert falls.effective_context() == 32
    assert falls.effective_context(0.001) == 16
    assert falls.effective_context(0.2) == 64
    assert result(l8=9.0, l16=10.0).effective_context() == 8


def test_an_overflowing_perplexity_is_infinite_not_an_error():
    tally = Tally()
    tally.add(torch.tensor([800.0], dtype=torch.float64), 1, [1, 2], None)
    assert score([tally], [1, 2], "tokens", 0).perplexity == math.inf
