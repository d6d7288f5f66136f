"""Candidates: the starts are the schemes' own frequencies, and whatever chance does to them they stay in order and in range."""

import random

import pytest
import torch

import hfpos
from hfpos.families import family_of
from hfpos.schemes.yarn import temperature
from hfpos.search.factors import STEPS, crossed, mutated, starts
from tests.tiny import tiny


ODD = 150  # tokens, from 64: a factor that is not a whole number


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])  # the second rotates a quarter of a head
@pytest.mark.parametrize(("start", "scheme"), [("pi", "linear"), ("ntk", "ntk"), ("yarn", "yarn")])
def test_a_start_is_the_scheme_it_is_named_after(family, start, scheme):
    model = tiny(family)
    factors = starts(family_of(model).geometry(), 64, ODD)[start]
    assert list(factors) == sorted(factors)
    assert factors[0] >= 1
    ids = torch.arange(ODD)[None] * 7 % model.config.vocab_size
    with torch.no_grad():
        with hfpos.patched(model, scheme, target_length=ODD):
            expected = model(ids).logits
        divisors = {"long_factor": factors, "short_factor": [1.0] * len(factors)}
        scale = temperature(ODD / 64) if scheme == "yarn" else 1.0
        with hfpos.patched(model, "longrope", **divisors, target_length=ODD, cache="pinned", attention_factor=scale):
            found = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_mutations_and_crossovers_stay_in_order_and_in_range():
    draw = random.Random(0)
    pool = [(4.0,) * 6, (1.0, 1.319507911, 1.741101127, 2.29739671, 3.031433133, 4.0), (1.0, 1.6, 4.0, 4.0, 4.0, 4.0)]
    for _ in range(3000):
        new = draw.choice([mutated(draw.choice(pool), 5.0, 0.3, draw), crossed(*draw.sample(pool, 2), draw)])
        assert len(new) == 6
        assert list(new) == sorted(new)
        assert new[0] >= 1
        assert new[-1] <= 5
        pool.append(new)
    for place in range(6):
        reached = {candidate[place] for candidate in pool}
        assert max(reached) - min(reached) > 2  # no divisor is stuck where it started


def test_a_mutation_moves_the_share_of_divisors_it_is_told_to_onto_the_grid():
    draw = random.Random(0)
    start = tuple(1 + index / 3 for index in range(60))
    for probability in (0.1, 0.9):
        changed = [mutated(start, 30.0, probability, draw) for _ in range(50)]
        moved = [new for child in changed for new, old in zip(child, start, strict=True) if new != old]
        assert len(moved) / (50 * 60) == pytest.approx(probability, abs=0.05)
        assert all(value == round(value * STEPS) / STEPS for value in moved)


def test_the_ends_of_the_range_can_be_drawn():
    draw = random.Random(0)
    drawn = {mutated((1.01, 1.02), 1.03, 1.0, draw) for _ in range(300)}
    assert {(1.0, 1.0), (1.0, 1.03), (1.02, 1.03)} <= drawn


def test_a_divisor_with_no_point_of_the_grid_between_its_neighbours_stays():
    children = [mutated((1.502, 1.504), 1.504, 0.5, random.Random(seed)) for seed in range(40)]
    assert {second for first, second in children if first == 1.502} == {1.504}


def test_a_crossover_takes_each_divisor_from_a_parent():
    draw = random.Random(0)
    one, other = (1.0, 1.1, 1.2, 1.3), (2.0, 2.1, 2.2, 2.3)
    children = {crossed(one, other, draw) for _ in range(500)}
    assert len(children) == 16
    assert all(set(child) <= {*one, *other} for child in children)
