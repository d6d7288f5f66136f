"""Needles in a haystack of the user's own text: facts to be found, among others of the same form."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hfpos.data.corpus import Document
from hfpos.evaluate.processes import local
from hfpos.evaluate.prompt import SPARE_TOKENS, Speaker, check_room, encoder
from hfpos.evaluate.retrieval import DEPTHS, Job, RetrievalResult, check_count, grid, run_grid
from hfpos.scheme import PatchError


# After RULER's wording (Hsieh et al. 2024, arXiv 2404.06654).
INTRODUCTION = "Some special magic numbers are hidden within the following text. Memorize them. I will quiz you about them afterwards.\n"
STATEMENT = "The special magic number for {city} is {number}."
QUESTION = "\nWhat {are} the special magic {numbers} for {cities} mentioned in the text? The special magic {numbers} for {cities} {are}"
NUMBERS = range(1_000_000, 10_000_000)
CITIES = (
    "Accra Algiers Amman Ankara Athens Baghdad Baku Bangkok Beijing Beirut Belgrade Berlin Bern Bogota Brussels Budapest Cairo Canberra "
    "Caracas Chicago Colombo Copenhagen Dakar Damascus Delhi Dhaka Doha Dublin Geneva Hanoi Harare Havana Helsinki Istanbul Jakarta "
    "Kabul Kampala Kiev Kigali Lagos Lima Lisbon London Luanda Lusaka Madrid Manila Maputo Melbourne Minsk Montreal Moscow Mumbai Nairobi "
    "Oslo Ottawa Paris Prague Quito Rabat Riga Riyadh Rome Santiago Seoul Singapore Sofia Stockholm Sydney Taipei Tallinn Tehran Tokyo "
    "Toronto Tripoli Tunis Vienna Vilnius Warsaw Zagreb"
).split()
MOST_SHIFTED = 0.05  # of the haystack: how far a statement may move to stand between two sentences


def needle(
    model: nn.Module,
    tokenizer: Any,
    haystack: str | Sequence[Document],
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    needles: int = 1,
    distractors: int = 0,
    trials: int = 5,
    max_new_tokens: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
    progress: bool = False,
) -> RetrievalResult:
    """Measure how many facts a model finds again in a long text.

    A fact reads "The special magic number for Paris is 1234567."; a question at the end asks for the numbers of all needles.
    The first needle stands at the depth asked for, the further ones evenly between it and the end, distractors (facts about cities
    that are not asked for) anywhere; each moves by up to 5 % of the haystack to stand between two sentences. The model goes on greedily.
    A needle is found if its number is among the first `needles` numbers said. At length L the prompt has exactly L - `max_new_tokens`
    tokens: nothing is cut off but the haystack, and all facts are looked for in the decoded prompt.

    Args:
        model: a Transformers causal language model, patched or not, or a wrapper around one (PEFT).
        tokenizer: the model's.
        haystack: text, or documents (`hfpos.data.corpus`), joined; each trial takes a stretch of it. It is never repeated.
        lengths: tokens of prompt and generation together. A model with rotary positions may be asked beyond its trained length.
        depths: where the first needle stands: 0 before the haystack, 1 after it.
        needles: facts to be found in each prompt; each of them counts.
        distractors: further facts of the same form in each prompt.
        trials: prompts for each length and depth, each with its own facts.
        max_new_tokens: tokens to generate; default: those of the facts asked for and 8 more.
        seed: of the facts, their places and the stretch of haystack.
        bos: whether the prompt begins with the BOS token; default: as the tokenizer does.
        progress: show a progress bar on stderr.

    Raises:
        PatchError: a haystack that is too short, a length that the prompt does not fit into or that the model cannot take, ...

    >>> from hfpos.data.corpus import train_tokenizer
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    ... )
    >>> tokenizer = train_tokenizer([INTRODUCTION + STATEMENT + QUESTION], vocab_size=300)
    >>> text = "It rained. " * 100
    >>> result = needle(LlamaForCausalLM(config), tokenizer, text, [800], depths=[0.5], needles=2, trials=1)
    >>> [(cell.length, cell.depth, cell.trials) for cell in result.cells]
    [(800, 0.5, 2)]
    """
    model = local(model)
    encode, start = encoder(tokenizer, bos)
    check_count("needles", needles, least=1)
    check_count("distractors", distractors, least=0)
    if needles + distractors > len(CITIES):
        raise PatchError(
            f"needles={needles}, distractors={distractors}: expected {len(CITIES)} together at most, a city for each"
        )
    jobs = grid(lengths, depths, trials)
    hay = _Haystack(haystack, encode, tokenizer)
    before = start + encode(INTRODUCTION)
    facts = {job: _Facts.draw(job, job.random(seed), needles, distractors, encode) for job in jobs}
    parts = {job: len(before) + each.tokens for job, each in facts.items()}

    examples = list(zip(CITIES, NUMBERS[::97_997], strict=False))  # so that the budget is the same for every grid
    answer = needles * max(len(encode(f" {number}")) for _, number in examples)
    sentence = max(len(encode(" " + STATEMENT.format(city=city, number=number))) for city, number in examples)
    budget = needles * sentence + SPARE_TOKENS if max_new_tokens is None else max_new_tokens
    check_count("max_new_tokens", budget, least=1)
    check_room([job.length for job in jobs], max(parts.values()), budget, answer)
    hay.check(max((job.length - budget - count, job.length) for job, count in parts.items()))
    speaker = Speaker(model, tokenizer, jobs[-1].length, budget)

    def score(batch: list[Job]) -> list[tuple[int, int]]:
        return [(_found(job, facts[job]), needles) for job in batch]

    def _found(job: Job, hidden: _Facts) -> int:
        ids = before + hay.hide(hidden, job.length - budget - parts[job]) + hidden.question
        said = speaker.numbers(job, ids, hidden.statements)[:needles]
        return sum(number in said for number in hidden.numbers[:needles])

    settings: dict[str, int | float | str] = {
        "needles": needles,
        "distractors": distractors,
        "trials": trials,
        "seed": seed,
        "max_new_tokens": budget,
        "bos": "yes" if start else "no",
    }
    chance = needles / len(NUMBERS)
    return run_grid("needle", model, jobs, score, chance=chance, settings=settings, progress=progress)


@dataclass(frozen=True)
class _Facts:
    """What one prompt hides, needles first, and the question (token ids).

    Attributes:
        places: of each statement, as a share of the haystack.
        offset: which stretch of the haystack, from 0 (its first tokens) up to 1.
    """

    numbers: list[str]
    statements: list[str]
    pieces: list[list[int]]
    places: list[float]
    offset: float
    question: list[int]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pieces)) + len(self.question)

    @classmethod
    def draw(
        cls, job: Job, source: random.Random, needles: int, distractors: int, encode: Callable[[str], list[int]]
    ) -> _Facts:
        cities = source.sample(CITIES, needles + distractors)
        numbers = [str(number) for number in source.sample(NUMBERS, len(cities))]
        statements = [STATEMENT.format(city=city, number=number) for city, number in zip(cities, numbers, strict=True)]
        places = [job.depth + (1 - job.depth) * index / needles for index in range(needles)]
        places += [source.random() for _ in range(distractors)]
        asked = cities[:needles]
        question = QUESTION.format(
            cities=", ".join(asked[:-1]) + " and " + asked[-1] if needles > 1 else asked[0],
            numbers="numbers" if needles > 1 else "number",
            are="are" if needles > 1 else "is",
        )
        pieces = [encode(f" {statement}") for statement in statements]
        return cls(numbers, statements, pieces, places, source.random(), encode(question))


class _Haystack:
    """Tokens of the user's text, and where sentences end among them."""

    def __init__(self, text: str | Sequence[Document], encode: Callable[[str], list[int]], tokenizer: Any) -> None:
        if not isinstance(text, str):
            documents = [each for each in text if isinstance(each, Document)] if isinstance(text, Sequence) else []
            if not documents or len(documents) < len(text):
                raise PatchError(
                    f"haystack is a {type(text).__name__}: expected a text, or a list of hfpos.data.corpus.Document"
                )
            text = "\n\n".join(each.text for each in documents)
        self.ids = encode(text)
        ends = {each for each in set(self.ids) if tokenizer.decode([each]).rstrip(" ").endswith((".", "!", "?", "\n"))}
        self.borders = [0, *(place for place, each in enumerate(self.ids, 1) if each in ends)]

    def check(self, most: tuple[int, int]) -> None:
        """Raise `PatchError` unless there is text for `most` (tokens of haystack, at which length)."""
        tokens, length = most
        if len(self.ids) < tokens:
            raise PatchError(
                f"haystack has {len(self.ids)} tokens, length {length} needs {tokens} of it; give a longer text, or ask for shorter lengths"
            )

    def hide(self, facts: _Facts, space: int) -> list[int]:
        """A stretch of `space` tokens with the statements of `facts` put in."""
        begins = self.borders[: bisect_right(self.borders, len(self.ids) - space)]
        begin = begins[int(facts.offset * len(begins))]
        found = [
            (self._between_sentences(begin, round(share * space), space), piece)
            for share, piece in zip(facts.places, facts.pieces, strict=True)
        ]
        ids, done = [], 0
        for place, piece in sorted(found, key=lambda each: each[0]):
            ids += self.ids[begin + done : begin + place] + piece
            done = place
        return ids + self.ids[begin + done : begin + space]

    def _between_sentences(self, begin: int, place: int, space: int) -> int:
        """The border of sentences next to `place`, or `place` itself where none is near."""
        at = bisect_left(self.borders, begin + place)
        near = [border - begin for border in self.borders[max(0, at - 1) : at + 1] if begin <= border <= begin + space]
        best = min(near, key=lambda border: abs(border - place), default=place)
        return best if abs(best - place) <= MOST_SHIFTED * space and place < space else place
