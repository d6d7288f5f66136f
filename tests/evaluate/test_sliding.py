"""Sliding windows, BOS and both ways to aggregate against scorers written out at length, and against published code's numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hfpos
from hfpos.evaluate import perplexity
from tests.tiny import tiny


GOLDEN = Path(__file__).parents[1] / "golden"
BOS = 1


def documents(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, (size,), generator=generator).tolist() for size in sizes]


def brute_force(model, rows, length, stride, bos):
    """Losses by document, each token's from a forward over just its context; position by position, no window plan."""
    found = []
    for row in rows:
        losses, end, first = [], 0, True
        while end < len(row):
            room = length - (bos == "every-window" or (bos == "first" and first))
            begin = 0 if first else end - max(0, room - stride)
            window = row[begin : begin + room]
            prefix = [BOS] if bos == "every-window" or (bos == "first" and first) else []
            means = []
            for at in range(end - begin, len(window)):
                context = prefix + window[:at]
                if context:
                    with torch.no_grad():
                        logits = model(torch.tensor([context]), use_cache=False).logits[0, -1].double()
                    means.append(-logits.log_softmax(-1)[window[at]].item())
            losses.append(means)
            end, first = begin + len(window), False
        found.append([window for window in losses if window])
    return found


@pytest.mark.parametrize("bos", ["none", "first", "every-window"])
@pytest.mark.parametrize(("length", "stride"), [(16, 4), (16, 16), (12, 1), (10, 9)])
def test_sliding_equals_brute_force(length, stride, bos):
    model = tiny("llama", vocab_size=96, bos_token_id=BOS)
    rows = documents(37, 16)
    windows = [window for row in brute_force(model, rows, length, stride, bos) for window in row]
    tokens = [loss for window in windows for loss in window]
    score = perplexity(model, rows, [length], stride, bos=bos).by_length[length]
    assert (score.tokens, score.windows) == (len(tokens), len(windows))
    assert score.nll == pytest.approx(sum(tokens) / len(tokens), rel=1e-6)
    old = perplexity(model, rows, [length], stride, bos=bos, aggregate="windows").by_length[length]
    assert old.nll == pytest.approx(sum(sum(window) / len(window) for window in windows) / len(windows), rel=1e-6)


def test_several_lengths_and_disjoint_windows():
    model, rows = tiny("llama", vocab_size=96), documents(64, 50)
    together = perplexity(model, rows, [16, 32], "window").by_length
    for length in (16, 32):
        alone = perplexity(model, rows, [length], length).by_length[length]
        assert together[length].nll == pytest.approx(alone.nll, rel=1e-6)
        assert together[length].tokens == sum(len(row) - math.ceil(len(row) / length) for row in rows)


def test_first_and_every_window_differ_only_when_windows_slide():
    model, rows = tiny("llama", vocab_size=96, bos_token_id=BOS), documents(40)
    truncated = [perplexity(model, rows, [20], bos=bos) for bos in ("first", "every-window")]
    assert truncated[0] == truncated[1]
    slid = [perplexity(model, rows, [20], 5, bos=bos).by_length[20].nll for bos in ("first", "every-window")]
    assert slid[0] != slid[1]


def test_length_dependent_model_slides_too():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = tiny("llama", vocab_size=96, max_position_embeddings=16, rope_parameters=rope)
    rows = documents(48)
    found = perplexity(model, rows, [32, 48], 8).by_length[32].nll
    fresh = tiny("llama", vocab_size=96, max_position_embeddings=16, rope_parameters=rope)
    losses = []
    for begin in (0, 8, 16):
        window = torch.tensor([rows[0][begin : begin + 32]])
        with torch.no_grad():
            logits = fresh(window, use_cache=False).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none")
        losses += nll[0 if begin == 0 else 23 :].tolist()
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-6)


REFERENCE = json.loads((GOLDEN / "perplexity.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("entry", REFERENCE["entries"], ids=str)
def test_published_code_under_its_own_aggregate(entry):
    """jquesnelle/yarn eval/perplexity.py, run unmodified (commit in the file), on a model whose weights are beside it."""
    config = AutoConfig.from_pretrained(GOLDEN / "tiny_llama")
    if "rope_parameters" in entry:
        config.rope_parameters = entry["rope_parameters"]
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny_llama", config=config)
    result = perplexity(
        model,
        REFERENCE["documents"],
        [entry["max_length"]],
        entry["sliding_window"],
        bos="every-window" if entry["add_start_token"] else "none",
        aggregate="windows",
    )
    assert result.by_length[entry["max_length"]].perplexity == pytest.approx(entry["mean_perplexity"], rel=1e-4)


@pytest.mark.parametrize("stride", [0, 17, 2.0, "windows", True])
def test_bad_stride(stride):
    with pytest.raises(hfpos.PatchError, match="stride="):
        perplexity(tiny("llama"), documents(40), [16, 32], stride)
