"""The evolution by itself, on perplexities that are made up."""

import pytest

from hfpos import PatchError
from hfpos.search.evolution import Settings, evolve


STARTS = [(4.0,) * 5, (1.0, 1.4, 2.0, 2.8, 4.0)]
BEST = (1.2, 1.3, 3.0, 3.1, 4.9)


def distance(candidate):
    return sum((value - best) ** 2 for value, best in zip(candidate, BEST, strict=True))


def test_it_finds_a_known_optimum_and_measures_each_candidate_once():
    asked = []

    def measure(candidate):
        asked.append(candidate)
        return distance(candidate)

    settings = Settings(population=20, iterations=30, mutations=10, crossovers=10, parents=10)
    best, history = evolve(STARTS, measure, 5.0, settings)
    assert len(asked) == len(set(asked)) == settings.candidates == history[-1].candidates
    assert asked[:2] == STARTS
    assert [each.candidates for each in history] == [20 + 20 * number for number in range(31)]
    lowest = [each.perplexity for each in history]
    assert lowest == sorted(lowest, reverse=True)
    assert lowest[-1] == distance(best) < 0.02 < 1 < min(map(distance, STARTS))


def test_the_seed_alone_decides():
    def asked(seed):
        found = []
        settings = Settings(population=6, iterations=3, mutations=4, crossovers=4, parents=3, seed=seed)
        evolve(STARTS, lambda candidate: found.append(candidate) or distance(candidate), 5.0, settings)
        return found

    assert asked(1) == asked(1) != asked(2)


def test_never_worse_than_the_best_start():
    best, history = evolve(
        STARTS, lambda candidate: STARTS.index(candidate) if candidate in STARTS else 9.0, 5.0, Settings()
    )
    assert best == STARTS[0]
    assert history[-1].perplexity == 0


def test_a_small_space_is_searched_to_its_end_and_no_further():
    settings = Settings(population=50, iterations=2, mutations=9, crossovers=9)
    best, history = evolve([(1.0,), (1.0,)], lambda candidate: -candidate[0], 1.04, settings)
    assert best == (1.04,)
    assert [each.candidates for each in history] == [5, 5, 5]


def test_no_generations_is_the_starts_alone():
    best, history = evolve(STARTS, distance, 5.0, Settings(population=1, iterations=0))
    assert best == min(STARTS, key=distance)
    assert [each.candidates for each in history] == [2]


@pytest.mark.parametrize(
    "settings",
    [
        {"population": 0},
        {"iterations": -1},
        {"mutations": 1.5},
        {"crossovers": True},
        {"parents": 1},
        {"mutation_probability": 0.0},
        {"mutation_probability": 1.1},
    ],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(PatchError, match=f"search: {next(iter(settings))}="):
        Settings(**settings)
