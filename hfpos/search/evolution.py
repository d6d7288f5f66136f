"""The evolution: candidates are measured, the best of them become parents, and mutations and crossovers of those come next."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hfpos.scheme import PatchError, require_number
from hfpos.search.factors import Factors, crossed, mutated


TRIES = 100  # candidates made, for each one wanted, until there are enough that were not seen before


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how wide to search; the defaults are those of the paper, arXiv 2402.13753.

    Attributes:
        population: candidates of the first generation, the starts among them.
        iterations: generations after the first.
        mutations, crossovers: new candidates of each of these generations.
        parents: how many of the best candidates so far they come from.
        mutation_probability: of each divisor in a mutation.
        seed: of every draw.
    """

    population: int = 64
    iterations: int = 40
    mutations: int = 16
    crossovers: int = 16
    parents: int = 32
    mutation_probability: float = 0.3
    seed: int = 0

    @property
    def candidates(self) -> int:
        """How many candidates are measured at most."""
        return self.population + self.iterations * (self.mutations + self.crossovers)

    def __post_init__(self) -> None:
        least = {"population": 1, "iterations": 0, "mutations": 0, "crossovers": 0, "parents": 2}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise PatchError(f"search: {name}={value!r} is not usable; expected a whole number >= {smallest}")
        require_number("search", "mutation_probability", self.mutation_probability, least=0, strictly=True)
        if self.mutation_probability > 1:
            raise PatchError(
                f"search: mutation_probability={self.mutation_probability} is not usable; expected more than 0 and at most 1"
            )


@dataclass(frozen=True)
class Generation:
    """What was known after a generation: how many candidates had been measured, and the lowest perplexity among them."""

    number: int
    candidates: int
    perplexity: float


def evolve(
    starts: Iterable[Factors], measure: Callable[[Factors], float], largest: float, settings: Settings
) -> tuple[Factors, list[Generation]]:
    """The best candidate found, never worse than the best of `starts`, and the course of the search.

    The same arguments give the same candidates in the same order.

    Args:
        starts: the candidates to begin with; all are measured.
        measure: the perplexity of a candidate; called once for each.
        largest: the largest divisor to draw.
        settings: how long and how wide to search.
    """
    draw = random.Random(settings.seed)
    scores = {start: measure(start) for start in dict.fromkeys(starts)}

    def mutate(parents: list[Factors]) -> Factors:
        return mutated(draw.choice(parents), largest, settings.mutation_probability, draw)

    def cross(parents: list[Factors]) -> Factors:
        one, other = draw.sample(parents, 2)
        return crossed(one, other, draw)

    def add(make: Callable[[list[Factors]], Factors], parents: list[Factors], count: int) -> int:
        """Measure `count` new candidates; how many are missing because `make` gave only known ones."""
        for _ in range(TRIES * count):
            if count == 0:
                break
            candidate = make(parents)
            if candidate not in scores:
                scores[candidate] = measure(candidate)
                count -= 1
        return count

    add(mutate, list(scores), settings.population - len(scores))
    history = [Generation(0, len(scores), min(scores.values()))]
    for number in range(1, settings.iterations + 1):
        parents = sorted(scores, key=lambda candidate: scores[candidate])[: settings.parents]
        missing = settings.crossovers if len(parents) < 2 else add(cross, parents, settings.crossovers)
        add(mutate, parents, settings.mutations + missing)
        history.append(Generation(number, len(scores), min(scores.values())))
    return min(scores, key=lambda candidate: scores[candidate]), history
