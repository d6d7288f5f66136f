"""What holds for every scheme: plain parameters that rebuild it, and frequencies that behave at their ends."""

import dataclasses
import json
import math

import pytest
import torch

import hfpos
from hfpos.scheme import Geometry, Rope
from tests.pairs import PAIRS


LLAMA = Geometry(heads=32, head_dim=128, rotary_dim=128, theta=1e4, trained_length=4096, allowed_length=4096)
BY_SCHEME = {pair.scheme: pair for pair in PAIRS}
SCHEMES = [hfpos.schemes()[name].create(**pair.parameters) for name, pair in BY_SCHEME.items()]
SCALINGS = ("linear", "ntk", "ntk_by_parts", "yarn", "llama3")


def create(name, **parameters):
    return hfpos.schemes()[name].create(**parameters)


def test_every_scheme_is_tried():
    assert set(BY_SCHEME) == set(hfpos.schemes()) - {"encoder_decoder"}  # which no decoder takes


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_parameters_rebuild_it(scheme):
    written = json.loads(json.dumps(scheme.parameters()))
    assert type(scheme).create(**written) == scheme
    for field in dataclasses.fields(scheme):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(scheme, field.name, 1)


def test_str_shows_what_is_not_default():
    assert str(create("yarn", factor=4)) == "yarn(factor=4)"
    assert str(create("nope")) == "nope()"
    assert str(create("longrope", short_factor=[1.0] * 99, long_factor=[1.0], factor=2)) == (
        "longrope(factor=2, short_factor=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1..., long_factor=[1.0])"
    )


def test_alibi_takes_any_sequence_of_slopes():
    assert create("alibi", slopes=(1, 0.5)) == create("alibi", slopes=[1.0, 0.5])
    assert create("alibi", slopes=torch.tensor([1.0, 0.5])) == create("alibi", slopes=[1.0, 0.5])
    assert create("longrope", short_factor=(1,), long_factor=(2,)) == create(
        "longrope", short_factor=[1.0], long_factor=[2.0]
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_factor_and_target_length_say_the_same(name):
    by_factor, by_length = create(name, factor=4), create(name, target_length=16_384)
    for first, second in zip(by_factor.frequencies(LLAMA), by_length.frequencies(LLAMA), strict=True):
        torch.testing.assert_close(torch.as_tensor(first), torch.as_tensor(second))
    assert by_factor.patched_length(LLAMA) == by_length.patched_length(LLAMA) == 16_384
    given = create(name, factor=4, original_length=4096)
    assert torch.equal(given.frequencies(LLAMA)[0], by_factor.frequencies(LLAMA)[0])


@pytest.mark.parametrize("name", SCALINGS)
def test_ends_of_the_spectrum(name):
    """The lowest frequency is divided by the factor; the highest stays, but for position interpolation."""
    inv_freq, _ = create(name, factor=8).frequencies(LLAMA)
    plain, _ = create("rope").frequencies(LLAMA)
    ratio = plain / inv_freq
    assert ratio[-1].item() == pytest.approx(8)
    assert ratio[0].item() == pytest.approx(8 if name == "linear" else 1)
    assert (ratio.diff() > -1e-9).all()


@pytest.mark.parametrize("name", ["dynamic", "dynamic_yarn"])
def test_dynamic_schemes_are_pure_functions_of_the_length(name):
    scheme = create(name, factor=4)
    plain, _ = create("rope").frequencies(LLAMA)
    lengths = torch.tensor([1, 4095, 4096, 4097, 16_384, 4096, 1])
    inv_freq, scale = scheme.frequencies_at(LLAMA, lengths)
    torch.testing.assert_close(inv_freq[[0, 1, 2, 5, 6]], plain.expand(5, -1), rtol=1e-12, atol=0)
    assert (scale[[0, 1, 2, 5, 6]] == 1).all()
    assert (inv_freq[3, 1:] < plain[1:] + 1e-15).all()
    assert (inv_freq[3, -1] < plain[-1]).all()
    assert (inv_freq[4, -1] < inv_freq[3, -1]).all()
    alone, _ = scheme.frequencies_at(LLAMA, lengths[3])
    assert torch.equal(alone, inv_freq[3])


def test_longrope_changes_one_token_beyond_the_original_length():
    scheme = create("longrope", factor=2, short_factor=[1.0] * 64, long_factor=[2.0] * 64)
    plain, _ = create("rope").frequencies(LLAMA)
    inv_freq, scale = scheme.frequencies_at(LLAMA, torch.tensor([4095, 4096, 4097]))
    torch.testing.assert_close(plain / inv_freq, torch.tensor([[1.0], [1.0], [2.0]]).double().expand(3, 64))
    assert scale.tolist() == pytest.approx([math.sqrt(1 + math.log(2) / math.log(4096))] * 3)


@pytest.mark.parametrize("name", ["longrope", "dynamic", "dynamic_yarn"])
def test_pinned_is_the_set_of_the_target_length(name):
    factors = {"short_factor": [1.0] * 64, "long_factor": [1.0 + i for i in range(64)]} if name == "longrope" else {}
    scheme = create(name, target_length=10_000, cache="pinned", **factors)
    assert scheme.seam == "freq"
    assert not scheme.length_dependent
    at_target, _ = scheme.frequencies_at(LLAMA, torch.tensor(10_000))
    assert torch.equal(scheme.frequencies(LLAMA)[0], at_target)
    to_prompt = create(name, cache="pinned", **factors)
    assert (to_prompt.seam, to_prompt.pins_prompt, to_prompt.length_dependent) == ("score", True, True)


def test_stock_parameters_name_what_they_need():
    for scheme in SCHEMES:
        if isinstance(scheme, Rope) and not hasattr(scheme, "branches"):  # which Transformers has no type for
            geometry = dataclasses.replace(LLAMA, head_dim=16, rotary_dim=16, trained_length=32, allowed_length=32)
            stock = scheme.stock(geometry)
            assert {"rope_type", "rope_theta"} <= stock.keys()
            json.dumps(stock)


@pytest.mark.parametrize("heads", [1, 2, 3, 12, 20, 25, 40, 71, 112])
def test_slopes_fall_within_each_power_of_two(heads):
    slopes = create("alibi").head_slopes(heads)
    lower = 2 ** math.floor(math.log2(heads))
    assert len(slopes) == heads
    assert slopes[:lower] == [2.0 ** (-8 * h / lower) for h in range(1, lower + 1)]
    assert slopes[lower:] == [2.0 ** (-4 * h / lower) for h in range(1, 2 * (heads - lower), 2)]
    assert create("alibi", factor=4).head_slopes(heads) == [slope / 4 for slope in slopes]


def test_sinusoidal_of_odd_width_and_far_positions():
    table = create("sinusoidal").table(torch.tensor([[0, 5], [70_000, 1]]), 7)
    assert table.shape == (2, 2, 7)
    exact = create("sinusoidal").table(torch.tensor([[0.0, 5.0], [70_000.0, 1.0]], dtype=torch.float64), 7)
    torch.testing.assert_close(table.double(), exact, rtol=0, atol=5e-3)
