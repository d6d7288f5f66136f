"""Needles in the user's text: exact prompts, facts whole and in their places, each needle counted."""

import re

import pytest

from hfpos.data.corpus import Document
from hfpos.evaluate.needle import CITIES, needle
from hfpos.scheme import PatchError
from tests.evaluate.answering import answering, tokenizer_for


HAY = " ".join(f"Sentence {number} tells of the {number % 7} seas and of nothing else." for number in range(400))
TOKENIZER = tokenizer_for(HAY)
FACT = re.compile(r"The special magic number for (\w+) is (\d{7})\.")


def asked(text):
    return re.findall(r"\b(?:" + "|".join(CITIES) + r")\b", text.rsplit("What ", 1)[1].split("mentioned")[0])


def read(text):
    """What somebody answers who reads all of it."""
    facts = dict(FACT.findall(text))
    return ", ".join(f"{city} {facts[city]}" for city in asked(text))


def run(answer, lengths=(700,), **settings):
    model = answering(TOKENIZER, answer)
    result = needle(model, TOKENIZER, HAY, **{"lengths": lengths, "depths": [0.5], "trials": 3, **settings})
    return result, model.prompts


@pytest.mark.parametrize(("needles", "distractors"), [(1, 0), (1, 5), (3, 0), (4, 4)])
def test_reading_finds_all(needles, distractors):
    result, prompts = run(read, needles=needles, distractors=distractors, depths=[0, 0.5, 1], lengths=[1300])
    assert result.accuracy == 1
    assert [cell.trials for cell in result.cells] == [3 * needles] * 3
    for _, text in prompts:
        facts = FACT.findall(text)
        assert len(facts) == len(set(facts)) == needles + distractors
        assert len({city for city, _ in facts}) == len(facts)
        assert len(set(asked(text))) == needles
        assert set(asked(text)) <= {city for city, _ in facts}


def test_wrong_answers():
    def others(text):
        return " ".join(number for city, number in FACT.findall(text) if city not in asked(text))

    assert run(others, distractors=3, needles=2, lengths=[1000])[0].accuracy == 0
    assert run(lambda text: "", needles=2)[0].accuracy == 0
    assert run(lambda text: read(text)[:-1])[0].accuracy == 0  # a digit short

    def all_numbers(text):  # more of them than were asked for
        return f"{others(text)} {read(text)}"

    assert run(all_numbers, distractors=1, lengths=[800])[0].accuracy == 0


def test_each_needle_counts():
    def first_only(text):
        return read(text).split(",")[0]

    cell = run(first_only, needles=2, lengths=[1000])[0].cells[0]
    assert (cell.correct, cell.trials) == (3, 6)


@pytest.mark.parametrize("length", [700, 1111])
@pytest.mark.parametrize("settings", [{}, {"needles": 2, "distractors": 2, "max_new_tokens": 40}, {"bos": True}])
def test_prompt_and_generation_are_the_length_exactly(length, settings):
    result, prompts = run(lambda text: "", lengths=[length], depths=[0, 0.4, 1], **settings)
    assert len(prompts) == 9
    for ids, text in prompts:
        assert len(ids) == length - result.settings["max_new_tokens"]
        assert text.removeprefix("<s>").startswith("Some special magic numbers are hidden")
        assert re.search(r"for [\w, ]+ (is|are)$", text)
    assert result.settings["bos"] == ("yes" if settings.get("bos") else "no")


def test_the_haystack_is_the_users_text_and_nothing_but_facts_is_put_in():
    _, prompts = run(lambda text: "", lengths=[900], depths=[0, 0.3, 0.7, 1], distractors=2)
    starts = set()
    for _, text in prompts:
        body = text.split("afterwards.\n", 1)[1].rsplit("\nWhat ", 1)[0]
        stretch = " ".join(FACT.sub("", body).split())
        assert stretch in HAY
        starts.add(stretch[:20])
    assert len(starts) > 3


def test_facts_stand_between_sentences():
    _, prompts = run(lambda text: "", lengths=[2500], depths=[0, 0.3, 0.7], distractors=2)
    for _, text in prompts:
        for match in FACT.finditer(text):
            assert text[: match.start()].rstrip()[-1] == "."
            assert re.match(r" (Sentence|The)|\nWhat| \w+ \d", text[match.end() :])


def test_depths():
    _, prompts = run(lambda text: "", lengths=[2500], depths=[0, 0.25, 0.5, 1], needles=2, trials=2)
    for depth, (_, text) in zip([0, 0, 0.25, 0.25, 0.5, 0.5, 1, 1], prompts, strict=True):
        places = {match[1]: match.start() / text.rindex("\nWhat") for match in FACT.finditer(text)}
        first, second = (places[city] for city in asked(text))
        assert first == pytest.approx(depth, abs=0.08)
        assert second == pytest.approx((1 + depth) / 2, abs=0.08)


def test_distractors_stand_anywhere():
    _, prompts = run(lambda text: "", lengths=[3000], distractors=8)
    for _, text in prompts:
        places = [match.start() / len(text) for match in FACT.finditer(text) if match[1] not in asked(text)]
        assert len(places) == 8
        assert min(places) < 0.4
        assert max(places) > 0.6


def test_a_text_without_sentences_is_cut_anywhere():
    model = answering(TOKENIZER, read)
    result = needle(model, TOKENIZER, "word " * 2000, [700], depths=[0.5], trials=2)
    assert result.accuracy == 1


def test_documents():
    documents = [Document("a", HAY[:4000]), Document("b", HAY[4000:])]
    model = answering(TOKENIZER, read)
    assert needle(model, TOKENIZER, documents, [700], depths=[0.5], trials=2).accuracy == 1


def test_seed_and_cells():
    def ids(**settings):
        return [
            ids
            for ids, _ in run(
                lambda text: "", **{"lengths": [700, 900], "depths": [0.2, 1], "distractors": 1, **settings}
            )[1]
        ]

    assert ids() == ids()
    assert ids(lengths=[900], depths=[1]) == ids()[-3:]
    assert ids(seed=1) != ids()


def test_a_short_haystack_says_what_it_needs():
    model = answering(TOKENIZER, read)
    with pytest.raises(PatchError, match=r"haystack has (\d+) tokens, length 1200 needs (\d+) of it") as caught:
        needle(model, TOKENIZER, HAY[:3000], [700, 1200], depths=[0.5], trials=3)
    has, needs = map(int, re.search(r"has (\d+) tokens, length 1200 needs (\d+)", str(caught.value)).groups())
    assert has == len(TOKENIZER(HAY[:3000]).input_ids)
    assert model.prompts == []
    scarce = TOKENIZER.decode(TOKENIZER(HAY).input_ids[: needs - 1])
    with pytest.raises(PatchError, match=f"haystack has {needs - 1} tokens"):
        needle(model, TOKENIZER, scarce, [1200], depths=[0.5], trials=3)
    enough = TOKENIZER.decode(TOKENIZER(HAY).input_ids[:needs])
    assert needle(model, TOKENIZER, enough, [1200], depths=[0.5], trials=3).accuracy == 1


def test_the_smallest_length_is_named_and_works():
    model = answering(TOKENIZER, read)
    settings = {"needles": 2, "distractors": 1, "trials": 3}
    with pytest.raises(PatchError, match=r"does not fit into 20; expected (\d+) or more") as caught:
        needle(model, TOKENIZER, HAY, [20], **settings)
    smallest = int(re.search(r"expected (\d+)", str(caught.value))[1])
    assert needle(model, TOKENIZER, HAY, [smallest + 5], **settings).accuracy == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": None}, "tokenizer=None: expected the model's tokenizer"),
        ({"haystack": []}, "haystack is a list: expected a text, or a list of"),
        ({"haystack": None}, "haystack is a NoneType"),
        ({"haystack": ["a", "b"]}, "haystack is a list"),
        ({"haystack": ""}, "haystack has 0 tokens, length 700 needs"),
        ({"needles": 0}, "needles=0: expected a whole number of 1 or more"),
        ({"distractors": -1}, "distractors=-1: expected a whole number of 0 or more"),
        ({"needles": 2, "distractors": 1000}, f"needles=2, distractors=1000: expected {len(CITIES)} together at most"),
        ({"lengths": []}, "lengths="),
        ({"depths": [-1]}, "depths="),
        ({"trials": 0}, "trials=0"),
        ({"needles": 3, "max_new_tokens": 5}, "max_new_tokens=5: the answer alone may take"),
    ],
)
def test_refusals(arguments, message):
    model = answering(TOKENIZER, read)
    with pytest.raises(PatchError, match=message):
        needle(**{"model": model, "tokenizer": TOKENIZER, "haystack": HAY, "lengths": [700], **arguments})
    assert model.prompts == []


def test_cities_differ():
    assert len(set(CITIES)) == len(CITIES)
