"""The attention and BLOOM benchmarks at tiny sizes: what they report is there, and a wrong implementation would show in it."""

import json
import math
from functools import partial

import pytest
import torch
from torch._inductor.exc import InductorError
from transformers import BloomConfig

import hfpos
from hfpos.bench import attention, attention_error, bloom, gpu
from hfpos.bench.contenders import Contender, Layer, biased, by_extra_dimensions, dense, eager, plain
from hfpos.bench.run import BENCHMARKS
from hfpos.schemes.alibi import Alibi
from hfpos.schemes.kerple import Kerple


TINY = BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4)


def numbers(found):
    """All the numbers in a nested result."""
    for value in found.values():
        yield from numbers(value) if isinstance(value, dict) else [value]


def all_positive(found):
    return all(math.isfinite(number) and number > 0 for number in numbers(found))


def run_only(call, device="cpu"):
    """In the place of `peak_bytes`, which first collects garbage."""
    call()
    return 10**9


@pytest.fixture
def small(monkeypatch):
    """Every layer has at most 96 tokens, and nothing is compiled."""
    slope = attention_error.steepest_slope
    monkeypatch.setattr(attention_error, "steepest_slope", lambda tokens, form: slope(min(tokens, 96), form))
    monkeypatch.setattr(attention, "Layer", lambda tokens, *args, **kwargs: Layer(min(tokens, 96), *args, **kwargs))
    monkeypatch.setattr(attention, "by_flex", lambda layer: {})
    monkeypatch.setattr(attention, "peak_bytes", run_only)


@pytest.mark.parametrize("scheme", [Alibi(), Kerple()])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_errors_are_those_of_rounding_for_what_is_right_and_large_for_what_is_not(scheme, dtype, bound):
    layer = Layer(96, dtype, heads=4, head_dim=16)
    ways = [biased(layer, scheme), dense(layer, scheme), dense(layer, scheme, made_before=isinstance(scheme, Alibi))]
    expected = attention_error.reference(layer, scheme, ways[0].weights)
    for contender in ways:
        assert max(attention_error.errors(contender, expected).values()) < bound
    if isinstance(scheme, Alibi):
        for contender in (by_extra_dimensions(layer, scheme), eager(layer, scheme)):
            assert max(attention_error.errors(contender, expected).values()) < bound
        wrong = (plain(layer), biased(layer, Alibi(factor=1.5)))
        for contender in wrong:
            assert min(attention_error.errors(contender, expected).values()) > 2 * bound
    else:
        wrong = attention_error.errors(biased(layer, Kerple(r2=4)), expected)
        assert min(wrong.values()) > 2 * bound


def test_the_reference_is_plain_attention_where_there_is_no_bias():
    layer = Layer(40, heads=2, head_dim=8)
    expected = attention_error.reference(layer, Alibi(slopes=[0, 0]), {})
    assert max(attention_error.errors(plain(layer), expected).values()) < 1e-5


@pytest.mark.parametrize("form", attention_error.FORMS)
def test_kernel_weights_are_what_comes_out_for_values_that_are_one_hot(form):
    layer = Layer(64, heads=3)
    contender = attention_error.FORMS[form](layer, Alibi())
    rows = attention_error.sampled(64, 10)
    found = attention_error.kernel_weights(contender, rows)
    layer.value = torch.eye(64).expand(1, 3, 64, 64).contiguous().requires_grad_()
    torch.testing.assert_close(found, contender.forward()[0, rows].transpose(0, 1), atol=1e-6, rtol=0)


def test_total_variation_is_small_but_for_positions_rounded_to_bfloat16():
    found = attention_error.total_variation(Layer(768, torch.bfloat16, heads=4, head_dim=32))
    assert found["cpu"] < 0.01
    assert found["extra_dimensions"] < 0.01
    assert found["stock"] > 0.1


def test_total_variation_shows_a_missing_bias(monkeypatch):
    monkeypatch.setitem(attention_error.FORMS, "cpu", lambda layer, scheme: plain(layer))
    assert attention_error.total_variation(Layer(96, torch.bfloat16, heads=4))["cpu"] > 0.3


def test_error_of_the_steepest_slope_grows_with_the_length_where_positions_travel_in_the_keys():
    found = attention.steepest_slope((64, 2048))
    assert found["cpu"][2048] < 1e-6
    assert found["extra_dimensions"][64] < found["extra_dimensions"][2048] < 3e-5


@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_decode_step_is_right_with_and_without_grouped_heads(key_heads):
    layer = Layer(50, heads=4, key_heads=key_heads, queries=1)
    torch.testing.assert_close(biased(layer, Alibi()).forward(), dense(layer, Alibi()).forward())
    assert (biased(layer, Alibi()).forward() - plain(layer).forward()).abs().max() > 0.05


def test_training_needs_less_memory_than_the_bias_written_out():
    assert attention.training(512, rounds=1)["peak_memory_over_dense"] < 0.9


def test_flex_is_left_out_where_it_does_not_compile(monkeypatch):
    def fail():
        raise InductorError(RuntimeError("no compiler"), None)

    layer = Layer(8)
    monkeypatch.setattr(attention, "biased", lambda layer, scheme, backend: Contender(fail, {}, layer))
    assert attention.by_flex(layer) == {}
    monkeypatch.setattr(attention, "biased", lambda layer, scheme, backend: plain(layer))
    assert list(attention.by_flex(layer)) == ["alibi_flex"]


@pytest.mark.usefixtures("small")
def test_everything_is_reported(monkeypatch):
    monkeypatch.setattr(attention, "decode_step", partial(attention.decode_step, rounds=3))
    found = attention.run()
    assert all_positive(found)
    assert list(found["speed"]["bfloat16"]) == [1024, 2048, 4096, 8192, 16_384]
    assert set(found["speed"]["float32"][4096]["forward"]) == {
        "plain_seconds",
        "alibi",
        "kerple",
        "alibi_dense",
        "alibi_dense_made_before",
        "alibi_eager",
    }
    assert set(found["other_schemes_float32_4096"]) == {"plain_seconds", "t5", "fire", "shaw", "sandwich"}
    assert len(found["decode_step_over_plain_8192"]) == 4
    assert json.loads(json.dumps(found))["error_4096"]["kerple"]["float32"]["cpu"]["gradients"] < 3e-5
    assert "attention" in BENCHMARKS


def test_the_gpu_part_runs_on_anything(monkeypatch):
    assert set(gpu.contenders(Layer(8))) >= {"plain", "alibi_sdpa", "alibi_flex_attention", "kerple_flex_attention"}
    # on a CPU flex_attention has no backward
    monkeypatch.setattr(gpu, "WAYS", tuple((scheme, "sdpa") for scheme, backend in gpu.WAYS if "flash" not in backend))
    monkeypatch.setattr(gpu, "compare", partial(gpu.compare, rounds=1))
    monkeypatch.setattr(gpu, "peak_bytes", run_only)
    found = gpu.run(tokens=32, most=64, checked=48, device="cpu")
    assert all_positive(found)
    assert set(found["forward_backward_gigabytes_64"]) == {"plain", *found["forward"]["time_over_plain"]}
    assert set(found["forward"]["time_over_plain"]) == {"alibi_sdpa", "kerple_sdpa", "t5_sdpa", "fire_sdpa"}
    assert found["error_48"]["alibi_sdpa"]["output"] < 0.01


def test_what_does_not_fit_on_a_gpu_is_reported_as_that():
    def fail():
        raise torch.OutOfMemoryError

    assert gpu.room({"alibi": Contender(fail, {}, Layer(8))}) == {"alibi": None}


def test_bloom_is_compared_as_a_model_and_as_its_attention():
    parts = ("model", *bloom.ATTENTION)
    found = bloom.compare(TINY, 300, parts, rounds=1)
    assert tuple(found) == parts
    for part in found.values():
        assert part["speedup"] > 0
        assert part["float32_largest_difference"] < 1e-4
        assert part["bfloat16_distance_patched_over_stock"] < 0.5


def test_bloom_with_another_bias_is_told_apart(monkeypatch):
    patch = hfpos.patch
    monkeypatch.setattr(hfpos, "patch", lambda model, scheme: patch(model, scheme, factor=2))
    found = bloom.compare(TINY, 40, bloom.ATTENTION, rounds=1)
    assert all(part["float32_largest_difference"] > 1e-2 for part in found.values())
