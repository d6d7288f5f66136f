"""`describe` reads the live model, not its config."""

import math

import pytest
import torch
import transformers

import hfpos
from tests.pairs import PAIRS, Pair, unpatched


FACTOR = {"factor": 4}
PLAIN = tuple(2 * math.pi * 10_000 ** (i / 8) for i in range(8))


def test_unpatched_models():
    for model_type, scheme, seam, wavelengths in (
        ("llama", "rope", "freq", PLAIN),
        ("gpt2", "learned", "embed", ()),
        ("bloom", "alibi", "bias", ()),
    ):
        found = hfpos.describe(unpatched(model_type))
        assert (found.scheme, found.seam, found.patched, found.proved) == (scheme, seam, False, False)
        assert (found.trained_length, found.logit_multiplier, found.stock_loadable) == (32, 1.0, True)
        assert found.wavelengths == pytest.approx(wavelengths, rel=1e-6)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_every_pair(pair):
    found = hfpos.describe(pair.model())
    scheme = hfpos.schemes()[pair.scheme].create(**pair.parameters)
    assert (found.scheme, found.parameters, found.seam) == (pair.scheme, scheme.parameters(), scheme.seam)
    assert found.patched
    assert found.trained_length == 32
    assert found.length_dependent == scheme.length_dependent
    if scheme.seam == "freq":
        assert len(found.wavelengths) == (2 if pair.model_type == "gpt_neox" else 8)
        assert found.wavelengths[0] >= 2 * math.pi - 1e-5
    lines = str(found).splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == [
        "model",
        "scheme",
        "layers" if pair.scheme == "per_layer" else "parameters",
    ]
    assert f"{pair.scheme} (patched, " in lines[1]
    assert all(len(line) < 140 for line in lines)


def test_frequencies_come_from_the_live_model():
    model = unpatched("llama")
    model.config.rope_parameters |= {
        "rope_type": "yarn",
        "factor": 8.0,
    }  # which changes nothing, as the model is built
    assert hfpos.describe(model).wavelengths == pytest.approx(PLAIN, rel=1e-6)
    with torch.no_grad():
        model.model.rotary_emb.inv_freq /= 2
    assert hfpos.describe(model).wavelengths == pytest.approx([2 * length for length in PLAIN], rel=1e-6)


def test_numbers_of_yarn():
    found = hfpos.describe(Pair("llama", "yarn", FACTOR).model())
    assert (found.patched_length, found.stock_loadable, found.proved) == (128, True, True)
    assert found.logit_multiplier == pytest.approx((0.1 * math.log(4) + 1) ** 2)
    assert found.wavelengths[0] == pytest.approx(PLAIN[0], rel=1e-6)
    assert found.wavelengths[-1] == pytest.approx(4 * PLAIN[-1], rel=1e-6)


def test_gpt2_and_bloom_say_what_rotates():
    for model_type, parameters in (("gpt2", {}), ("bloom", {"original_length": 32})):
        found = hfpos.describe(Pair(model_type, "yarn", FACTOR | parameters).model())
        assert found.wavelengths[-1] == pytest.approx(4 * PLAIN[-1], rel=1e-6)
        assert found.logit_multiplier == pytest.approx(1.138629436**2)


def test_standing_pairs_and_layers_of_two_kinds():
    found = hfpos.describe(Pair("llama", "partial", {"fraction": 0.25}).model())
    assert found.wavelengths[2:] == (math.inf,) * 6
    assert "6 standing still" in str(found)
    nested = hfpos.describe(Pair("gemma3_text", "linear", FACTOR).model())
    assert nested.wavelengths[0] == pytest.approx(4 * 2 * math.pi, rel=1e-6)  # of the full layers


def test_what_is_longer_than_the_trained_length():
    assert "8 pairs, 6.283 ... 1.987e+04 tokens; 6 longer than the trained length" in str(
        hfpos.describe(unpatched("llama"))
    )


def test_on_meta():
    config = unpatched("llama").config
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert hfpos.describe(model).wavelengths == ()
    assert len(hfpos.describe(hfpos.patch(model, "yarn", **FACTOR)).wavelengths) == 8


def test_what_it_cannot_describe():
    with pytest.raises(hfpos.PatchError, match="found no Transformers model in Linear"):
        hfpos.describe(torch.nn.Linear(2, 2))
