"""What a model says after a prompt: greedy, whole, whatever its own settings and its wrapper."""

import importlib
import logging
import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers import processors
from transformers import LlamaForCausalLM

from hfpos.data.corpus import train_tokenizer
from hfpos.evaluate.prompt import Speaker, encoder
from hfpos.evaluate.retrieval import Job
from hfpos.scheme import PatchError
from tests.tiny import tiny


NEW = 12
FACT = "It is 42."
TOKENIZER = train_tokenizer([f"{FACT} 0 1 2 3 4 5 6 7 8 9 "], vocab_size=280)
UNRULY = {
    "do_sample": True,
    "temperature": 2.0,
    "top_k": 7,
    "num_beams": 3,
    "max_length": 7,
    "min_new_tokens": 3,
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "use_cache": False,
    "num_return_sequences": 2,
    "bad_words_ids": [[5]],
}


def model(**settings):
    return tiny(
        "llama",
        seed=5,
        **{"vocab_size": 280, "max_position_embeddings": 512, "eos_token_id": 1, "bos_token_id": 0, **settings},
    )


def prompt(filler=60):
    encode, start = encoder(TOKENIZER, None)
    return start + encode("x" * filler + FACT)


def says(wrapped, ids, language=None):
    """The tokens that the model inside generates, and the settings of the call."""
    language = language or wrapped
    generate, seen = language.generate, {}

    def keep(**kwargs):
        seen.update(kwargs, output=generate(**kwargs))
        return seen["output"]

    language.generate = keep
    try:
        Speaker(wrapped, TOKENIZER, 512, NEW).numbers(Job(len(ids) + NEW, 0.5, 0), ids, [FACT])
    finally:
        del language.generate
    return seen["output"][0, len(ids) :].tolist(), seen


def greedy(language, ids):
    """One token after the other, from whole forwards."""
    ids = list(ids)
    for _ in range(NEW):
        with torch.no_grad():
            ids.append(language(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        if ids[-1] == 1:
            break
    return ids[-NEW:]


def test_it_is_greedy_whatever_the_models_own_settings():
    language, ids = model(max_position_embeddings=40), prompt()
    expected = greedy(language, ids)
    assert len(set(expected)) > 3
    own = transformers.GenerationConfig(**UNRULY)
    language.generation_config = own
    with warnings.catch_warnings(), _log() as lines:
        warnings.simplefilter("error")
        assert says(language, ids)[0] == expected
    assert lines == []
    assert language.generation_config is own


def test_it_ends_where_the_model_ends():
    language, ids = model(), prompt()
    expected = greedy(language, ids)
    language.generation_config.eos_token_id = [1, expected[6]]
    assert says(language, ids)[0] == expected[: expected.index(expected[6]) + 1]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_speaks():
    language, ids = model(), prompt()
    bare = greedy(language, ids)
    torch.manual_seed(1)
    wrapped = get_peft_model(language, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    language.generation_config = transformers.GenerationConfig(**UNRULY)
    expected = greedy(wrapped.eval(), ids)
    assert expected != bare
    with _log() as lines:
        assert says(wrapped, ids, language)[0] == expected
    assert lines == []


def test_a_long_prompt_goes_through_in_pieces(monkeypatch):
    language, ids = model(), prompt(300)
    whole, seen = says(language, ids)
    assert seen["generation_config"].prefill_chunk_size is None
    monkeypatch.setattr(importlib.import_module("hfpos.evaluate.prompt"), "PREFILL_CHUNK", 100)
    pieces, seen = says(language, ids)
    assert seen["generation_config"].prefill_chunk_size == 100
    assert pieces == whole
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    assert says(model(rope_parameters=rope), ids)[1]["generation_config"].prefill_chunk_size is None


class Echo(LlamaForCausalLM):
    """Says `reply` after the prompt."""

    reply = ""

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([TOKENIZER(self.reply).input_ids], dtype=torch.long)], dim=1)


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ("", []),
        (" no idea", []),
        (" 42.", ["42"]),
        ("\n\n42, or 7", ["42", "7"]),
        (" 421", ["421"]),
        ("</s>42", ["42"]),
    ],
)
def test_only_what_is_said_counts(reply, numbers):
    echo = Echo(model().config)
    echo.reply = reply
    ids = prompt()
    assert Speaker(echo, TOKENIZER, 512, NEW).numbers(Job(len(ids) + NEW, 0.5, 0), ids, [FACT]) == numbers


def test_special_tokens_are_no_numbers():
    reserved = train_tokenizer([FACT], vocab_size=270)
    reserved.add_special_tokens({"additional_special_tokens": ["<reserved 42>"]})
    echo, ids = Echo(model().config), reserved(FACT).input_ids
    echo.generate = lambda input_ids, **_: torch.cat(
        [input_ids, torch.tensor([reserved("<reserved 42> 7").input_ids])], dim=1
    )
    assert Speaker(echo, reserved, 512, NEW).numbers(Job(len(ids) + NEW, 0.5, 0), ids, [FACT]) == ["7"]


def test_long_texts_are_encoded_without_a_word():
    short = train_tokenizer([FACT], vocab_size=270)
    short.model_max_length = 8
    with _log() as lines:
        assert len(encoder(short, None)[0](FACT * 20)) > 8
    assert lines == []


def test_a_prompt_of_another_length_is_refused():
    ids, speaker = prompt(), Speaker(model(), TOKENIZER, 512, NEW)
    with pytest.raises(
        PatchError, match=f"prompt at length 99, depth 0.5, trial 0 has {len(ids)} tokens, expected {99 - NEW}"
    ):
        speaker.numbers(Job(99, 0.5, 0), ids, [FACT])


def test_a_prompt_without_its_fact_is_refused():
    ids, speaker = prompt(), Speaker(model(), TOKENIZER, 512, NEW)
    cut = ids[:-1]
    with pytest.raises(PatchError, match=r"depth 0.5, trial 0 does not read 'It is 42.'"):
        speaker.numbers(Job(len(cut) + NEW, 0.5, 0), cut, [FACT])


def test_ids_of_another_vocabulary_are_refused():
    ids, speaker = [*prompt(), 280], Speaker(model(), TOKENIZER, 512, NEW)
    with pytest.raises(PatchError, match="has the id 280; expected 0 to 279"):
        speaker.numbers(Job(len(ids) + NEW, 0.5, 0), ids, [FACT])


def test_bos():
    plain = train_tokenizer(["a b"], vocab_size=260)
    assert encoder(plain, None)[1] == []  # it adds none itself
    assert encoder(plain, True)[1] == [plain.bos_token_id]
    assert encoder(plain, False)[1] == []
    adding = train_tokenizer(["a b"], vocab_size=260)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert adding("a").input_ids[0] == 0
    encode, start = encoder(adding, None)
    assert start == [0]
    assert encoder(adding, False)[1] == []
    assert not set(encode("a b")) & {0, 1}
    plain.bos_token = None
    assert encoder(plain, None)[1] == []
    with pytest.raises(PatchError, match="bos=True, but the tokenizer has no BOS token"):
        encoder(plain, True)


@pytest.mark.parametrize("nothing", [None, "gpt2", len])
def test_no_tokenizer(nothing):
    with pytest.raises(PatchError, match="tokenizer=.*expected the model's tokenizer"):
        encoder(nothing, None)


class _log(logging.Handler):  # noqa: N801  # reads as a function
    """Everything Transformers logs in a block."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.lines = []

    def emit(self, record):
        if record.levelno >= logging.WARNING:
            self.lines.append(record.getMessage())

    def __enter__(self):
        transformers.logging.add_handler(self)
        return self.lines

    def __exit__(self, *_):
        transformers.logging.remove_handler(self)
