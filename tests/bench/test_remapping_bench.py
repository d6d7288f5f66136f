"""The remapping benchmark at a tiny size: every scheme of the score seam is in it, and what it reports is a number."""

import math

import pytest
import torch

import hfpos
from hfpos.attention import decayed, remapped
from hfpos.bench import remapping
from hfpos.bench.contenders import Layer
from hfpos.bench.run import BENCHMARKS


def test_every_figure_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remapping, "peak_bytes", lambda call: [call(), 10**9][1])
    schemes = {"self_extend", "rerope", "rerope_leaky", "dual_chunk", "lm_infinite", "streaming_llm", "xpos"}
    by_pairs = {name for name, cls in hfpos.schemes().items() if hasattr(cls, "branches") or hasattr(cls, "decay")}
    assert schemes == by_pairs | {"rerope_leaky"}
    timed = [*remapping.speed(96, torch.bfloat16, 1, 1).values(), remapping.decode_step(95, rounds=1)]
    for figures in (*timed, remapping.peak_memory(96)):
        assert figures.keys() - {"plain_seconds", "plain_megabytes"} == schemes
        assert all(math.isfinite(figure) and figure > 0 for figure in figures.values())
    assert "remapping" in BENCHMARKS


def test_what_is_timed_is_the_scheme_and_not_a_text_that_it_leaves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for module, name in ((remapped, "merged_attention"), (decayed.DecayedRotation, "_block")):
        stock = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, stock=stock: called.append(1) or stock(*args))
    contenders = remapping.contenders(Layer(96))
    for contender in contenders.values():
        contender.forward()
    assert len(called) == len(contenders) - 1
