"""A comparison is the same as patching and measuring by hand; the model comes out as it went in; reasons stand where numbers cannot."""

import json

import pytest
import torch

import hfpos
from hfpos.data import load_documents, train_tokenizer
from hfpos.evaluate import compare, perplexity
from hfpos.evaluate.pattern import pattern, wavelengths
from hfpos.evaluate.retrieval_tests import chosen_tests
from hfpos.evaluate.scheme_list import entries
from hfpos.report import results as schema
from hfpos.schemes import REGISTRY
from tests.state import State
from tests.tiny import tiny


def documents(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, (size,), generator=generator).tolist() for size in sizes]


def test_equals_patching_and_measuring_by_hand(tmp_path):
    model, rows = tiny("llama"), documents(300, 280)
    before = State(model)
    results = compare(
        model, rows, "linear,dynamic(cache='pinned'),yarn(beta_fast=16),alibi", [64, 128, 256], stride=32
    )
    assert State(model) == before
    comparison = results.comparisons[0]
    assert list(comparison.refused) == []
    by_hand = {
        "none": None,
        "linear": REGISTRY["linear"](factor=4),
        "dynamic(cache='pinned')": REGISTRY["dynamic"](factor=4, cache="pinned"),
        "yarn(beta_fast=16)": REGISTRY["yarn"](factor=4, beta_fast=16),
        "alibi": REGISTRY["alibi"](),
    }
    assert [run.label for run in comparison.runs] == list(by_hand)
    for run in comparison.runs:
        fresh = tiny("llama")
        if by_hand[run.label] is not None:
            hfpos.patch(fresh, by_hand[run.label])
        assert run.perplexity == perplexity(fresh, rows, [64, 128, 256], 32)
        assert run.needs_training == (run.label == "alibi")
    schema.save(results, tmp_path / "results.json")
    assert schema.load(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["schema"] == "hfpos-results-1"


def test_every_length_is_measured_on_the_same_documents():
    model = tiny("llama", vocab_size=96)
    comparison = compare(model, documents(200, 60, 20, 130), "ntk", [32, 128]).comparisons[0]
    for run in comparison.runs:
        assert {score.documents for score in run.perplexity.by_length.values()} == {2}
    assert [skipped.document for skipped in comparison.skipped] == ["document 1", "document 2"]
    assert comparison.data.documents == 2
    assert comparison.data.tokens == 330
    with pytest.raises(hfpos.PatchError, match="no document reaches length 500: the longest has 200"):
        compare(model, documents(200), "ntk", [500])


def test_the_trained_length_is_measured_in_any_case():
    comparison = compare(tiny("llama", vocab_size=96), documents(200), "ntk", [128]).comparisons[0]
    assert comparison.protocol.lengths == (64, 128)
    assert compare(tiny("llama", vocab_size=96), documents(200), [], [128]).comparisons[0].protocol.lengths == (128,)


def test_a_scheme_that_does_not_fit_or_breaks_is_refused_not_fatal():
    model = tiny("llama", vocab_size=96)
    comparison = compare(
        model, documents(200), "learned(init='tile'),ntk,yarn(attention_factor=1e30)", [64, 128]
    ).comparisons[0]
    assert [run.label for run in comparison.runs][:2] == ["none", "ntk"]
    assert "is for a model that has a table" in comparison.refused["learned(init='tile')"]
    broken = [*comparison.refused, *(run.label for run in comparison.runs)]
    assert "yarn(attention_factor=1e30)" in broken


def test_a_model_with_a_table_is_compared_as_far_as_its_table_reaches():
    model = tiny("gpt2", vocab_size=96)
    comparison = compare(model, documents(200), "learned,yarn", [32, 64, 128]).comparisons[0]
    lengths = {run.label: list(run.perplexity.by_length) for run in comparison.runs}
    assert lengths == {"none": [32, 64], "learned": [32, 64, 128], "yarn": [32, 64, 128]}


def test_a_bad_model_is_an_error():
    model = tiny("llama", vocab_size=96)
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(hfpos.PatchError, match="not a finite number"):
        compare(model, documents(200), "ntk", [64])


def test_record_of_data_model_and_protocol():
    texts = [" ".join(f"{i} times {j} is {i * j}." for i in range(90)) for j in range(3)]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    rows = load_documents(texts, tokenizer, max_tokens=300)
    model = tiny("llama", vocab_size=len(tokenizer), bos_token_id=1)
    found = compare(model, rows, "ntk", [64, 128], bos="first", tolerance=0.05, name="mine").comparisons[0]
    assert (found.model.path, found.model.trained_length, found.model.native_scheme) == ("mine", 64, "rope")
    assert found.model.parameters == model.num_parameters()
    assert (found.protocol.bos, found.protocol.bos_token_id, found.protocol.tolerance) == ("first", 1, 0.05)
    assert found.data.preparation == {"max_tokens": 300}
    assert {"versions", "hardware", "commit", "date", "command"} <= found.provenance.keys()
    other = compare(model, load_documents(texts, tokenizer, max_tokens=299), "ntk", [64]).comparisons[0]
    assert other.data.sha256 != found.data.sha256
    assert other.model.fingerprint == found.model.fingerprint


def test_retrieval_runs_under_every_scheme():
    model = tiny("llama", vocab_size=96)
    tests = chosen_tests("key-value", [32, 64], tokenizer=None, haystack=None, depths=[0.0, 1.0], trials=2, seed=0)
    for run in compare(model, documents(200), "ntk", [64], retrieval=tests).comparisons[0].runs:
        assert [(cell.length, cell.depth) for cell in run.retrieval[0].cells] == [
            (32, 0.0),
            (32, 1.0),
            (64, 0.0),
            (64, 1.0),
        ]
    for names, haystack, message in (
        ("passkye", None, "did you mean 'passkey'"),
        ("needle", None, "haystack="),
        ("", "x", "needle"),
    ):
        with pytest.raises(hfpos.PatchError, match=message):
            chosen_tests(names, [32], tokenizer=None, haystack=haystack, depths=[0.0], trials=1, seed=0)


def test_wavelengths_and_patterns():
    model = tiny("llama")
    plain = wavelengths(model, 256)
    assert plain == pytest.approx(hfpos.describe(model).wavelengths)
    near = pattern(model, 256)
    assert (near.kind, near.distances[0], near.distances[-1]) == ("rotation", 1, 255)
    inv_freq = torch.tensor([2 * torch.pi / wavelength for wavelength in plain], dtype=torch.float64)
    expected = [torch.cos(distance * inv_freq).mean().item() for distance in near.distances]
    assert near.middle == pytest.approx(expected, abs=1e-6)
    with hfpos.patched(model, "dynamic", factor=4):
        stretched = wavelengths(model, 256)  # as they are when 256 tokens are read
        assert stretched[-1] > plain[-1]
        assert wavelengths(model, 64) == pytest.approx(plain)
    with hfpos.patched(model, "alibi"):
        found = pattern(model, 256)
        assert found.kind == "bias"
        slopes = REGISTRY["alibi"]().head_slopes(model.config.num_attention_heads)
        assert (found.low[9], found.high[9]) == pytest.approx(
            (-max(slopes) * found.distances[9], -min(slopes) * found.distances[9])
        )
        assert wavelengths(model, 256) == ()
    with hfpos.patched(model, "self_extend", group_size=8, window=16):
        assert wavelengths(model, 256) == pytest.approx(plain)
        grouped = pattern(model, 256)
        for distance, value in zip(grouped.distances, grouped.middle, strict=True):
            seen = distance if distance < 16 else 255 // 8 + 16 - 16 // 8 - (255 - distance) // 8
            assert value == pytest.approx(torch.cos(seen * inv_freq).mean().item(), abs=1e-6)
    with hfpos.patched(model, "nope"):
        assert pattern(model, 256) is None
    assert pattern(tiny("bloom"), 64).kind == "bias"


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("linear, yarn", ["none", "linear", "yarn"]),
        ("none,pi", ["none", "pi"]),
        ("yarn(beta_fast=16, beta_slow=2),longrope(short_factor=[1,1],long_factor=[2,3])", None),
    ],
)
def test_scheme_lists(text, labels):
    found = entries(text, 4, 64, 256)
    assert labels is None or [entry.label for entry in found] == labels
    assert all(entry.scheme.factor == 4 for entry in found[1:])
    if labels is None:
        assert found[2].scheme.long_factor == [2, 3]


def test_how_far_to_extend():
    assert entries("yarn", None, 64, 256)[1].scheme.factor == 4
    assert entries("yarn(target_length=128)", 4, 64, 256)[1].scheme.target_length == 128
    assert entries("learned", 2, 64, 256)[1].scheme.target_length == 128
    assert entries("self_extend(group_size=2)", 4, 64, 256)[1].scheme.factor is None
    assert [entries(text, 2, 64, 256)[1].scheme.factor for text in ("alibi", "alibi(factor=3)")] == [1, 3]
    refused = compare(tiny("llama", vocab_size=96), documents(100), "yarn", [64]).comparisons[0].refused
    assert "how far to extend is not given" in refused["yarn"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("yarm", "did you mean 'yarn'"),
        ("yarn(beta=1)", "did you mean 'beta_"),
        ("yarn(16)", "expected parameters"),
        ("yarn(beta_fast=)", "expected parameters"),
        ("yarn(beta_fast=open)", "expected parameters"),
        ("yarn,,ntk", "separated by commas"),
        ("yarn,yarn", "given twice"),
        ("ya rn", "is not a scheme"),
    ],
)
def test_bad_scheme_lists(text, message):
    with pytest.raises(hfpos.PatchError, match=message):
        entries(text, 4, 64, 256)
