"""The pass key test: exact prompts, the key where it was asked for, and only the right number right."""

import re

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

import hfpos
from hfpos.evaluate.passkey import passkey
from hfpos.evaluate.retrieval import wilson
from hfpos.scheme import PatchError
from tests.evaluate.answering import answering, tokenizer_for
from tests.tiny import tiny


TOKENIZER = tokenizer_for()


def key_in(text):
    first, second = re.findall(r"pass key is (\d+)\. Remember it\. (\d+) is the pass key", text)[0]
    assert first == second
    return first


def test_reading_finds_all_and_echoing_none():
    model = answering(TOKENIZER, lambda text: f" {key_in(text)}. Here we")
    result = passkey(model, TOKENIZER, [300, 512], trials=3)
    assert result.accuracy == 1
    assert (result.task, result.chance) == ("passkey", 1 / 90_000)
    assert [(cell.length, cell.depth) for cell in result.cells] == [
        (length, depth) for length in (300, 512) for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert all((cell.low, cell.high) == wilson(3, 3) for cell in result.cells)
    model.answer = lambda text: " no idea"
    assert passkey(model, TOKENIZER, [300], trials=3).accuracy == 0


@pytest.mark.parametrize(
    ("answer", "accuracy"),
    [
        ("{key}", 1),
        (": {key}", 1),
        ("\n{key}", 1),
        ("{key}7", 0),
        ("1{key}", 0),
        (" 12, {key}", 0),
        (" ", 0),
    ],
)
def test_the_first_number_must_be_the_key(answer, accuracy):
    model = answering(TOKENIZER, lambda text: answer.format(key=key_in(text)))
    assert passkey(model, TOKENIZER, [300], depths=[0.5], trials=3).accuracy == accuracy


@pytest.mark.parametrize("length", [200, 301, 1000])
@pytest.mark.parametrize("new", [None, 9])
def test_prompt_and_generation_are_the_length_exactly(length, new):
    model = answering(TOKENIZER, lambda text: "")
    result = passkey(model, TOKENIZER, [length], depths=[0, 0.3, 1], trials=2, max_new_tokens=new)
    budget = result.settings["max_new_tokens"]
    assert budget >= 9
    assert len(model.prompts) == 6
    for ids, text in model.prompts:
        assert len(ids) == length - budget
        assert text.startswith("There is an important info hidden inside a lot of irrelevant text.")
        assert text.endswith("What is the pass key? The pass key is")
        assert "The grass is green. The sky is blue. The sun is yellow." in text or length == 200


def test_depth():
    model = answering(TOKENIZER, lambda text: "")
    passkey(model, TOKENIZER, [2000], depths=[0, 0.25, 0.5, 1], trials=1)
    for depth, (_, text) in zip([0, 0.25, 0.5, 1], model.prompts, strict=True):
        before, after = text.split("The pass key is", 1)
        ahead, behind = before.count("sky"), after.count("sky")
        assert ahead / (ahead + behind) == pytest.approx(depth, abs=0.04)


def test_seed_and_cells():
    def keys(**settings):
        model = answering(TOKENIZER, lambda text: "")
        passkey(model, TOKENIZER, **{"lengths": [300, 400], "depths": [0, 1], "trials": 2, **settings})
        return [ids for ids, _ in model.prompts]

    assert keys() == keys()
    assert keys(lengths=[400], depths=[1]) == keys()[-2:]
    assert keys(seed=1) != keys()
    assert len({key_in(TOKENIZER.decode(ids)) for ids in keys()}) == 8


@pytest.mark.parametrize("bos", [True, False])
def test_bos(bos):
    model = answering(TOKENIZER, lambda text: "")
    result = passkey(model, TOKENIZER, [300], depths=[0.5], trials=1, bos=bos)
    ids = model.prompts[0][0]
    assert (ids[0] == TOKENIZER.bos_token_id) == bos
    assert len(ids) + result.settings["max_new_tokens"] == 300
    assert result.settings["bos"] == ("yes" if bos else "no")


def test_the_smallest_length_is_named_and_works():
    model = answering(TOKENIZER, lambda text: key_in(text))
    with pytest.raises(PatchError, match=r"does not fit into 20; expected (\d+) or more") as caught:
        passkey(model, TOKENIZER, [20, 500])
    smallest = int(re.search(r"expected (\d+)", str(caught.value))[1])
    with pytest.raises(PatchError, match=f"expected {smallest} or more"):
        passkey(model, TOKENIZER, [smallest - 1, 500])
    assert model.prompts == []
    assert passkey(model, TOKENIZER, [smallest, 500]).accuracy == 1


def test_beyond_the_trained_length_but_not_beyond_a_table():
    lengths = {"lengths": [300], "depths": [0.5], "trials": 1}
    result = passkey(tiny("llama", vocab_size=400, max_position_embeddings=64), TOKENIZER, **lengths)
    assert result.cells[0].trials == 1
    gpt2 = tiny("gpt2", vocab_size=400)
    with pytest.raises(PatchError, match="has 64 learned positions, 300 were asked for"):
        passkey(gpt2, TOKENIZER, **lengths)
    hfpos.patch(gpt2, "learned", target_length=300)
    assert passkey(gpt2, TOKENIZER, **lengths).cells[0].trials == 1


def test_a_tokenizer_that_loses_the_key_is_refused():
    words = ["<unk>", *"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz .?\n"]
    raw = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    no_digits = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
    model = answering(TOKENIZER, lambda text: "")
    with pytest.raises(
        PatchError, match=r"prompt at length 1000, depth 0.5, trial 0 does not read 'The pass key is \d+"
    ):
        passkey(model, no_digits, [1000], depths=[0.5])
    lower = tokenizer_for()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(PatchError, match="does not read"):
        passkey(model, lower, [1000], depths=[0.5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": None}, "tokenizer=None: expected the model's tokenizer"),
        ({"lengths": []}, "lengths="),
        ({"lengths": [True]}, "lengths="),
        ({"depths": [2]}, "depths="),
        ({"trials": 0}, "trials=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 2}, "max_new_tokens=2: the answer alone may take"),
    ],
)
def test_refusals(arguments, message):
    model = answering(TOKENIZER, lambda text: "")
    with pytest.raises(PatchError, match=message):
        passkey(**{"model": model, "tokenizer": TOKENIZER, "lengths": [300], **arguments})
    assert model.prompts == []
