"""The key-value test: what a context holds, and that models which can look up and models which cannot are told apart."""

import importlib

import pytest
import torch
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

import hfpos
from hfpos.evaluate.key_value import copying, key_value
from hfpos.scheme import PatchError
from tests.tiny import tiny


WORDS = 40
SPECIAL = {"bos_token_id": 0, "eos_token_id": [1, 2], "pad_token_id": 3}


class Spy(LlamaForCausalLM):
    """Keeps what it is given; `look_up` says whether the answer is what followed the last token earlier, or what did not."""

    look_up = True

    def forward(self, input_ids, **kwargs):
        self.given = [*getattr(self, "given", []), (input_ids, kwargs)]
        logits = torch.zeros(len(input_ids), 1, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            follower = ids[ids.index(ids[-1]) + 1]
            logits[row, 0, follower] = 1 if self.look_up else -1
        return CausalLMOutputWithPast(logits=logits)


def spy(**settings):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Spy(LlamaConfig(vocab_size=WORDS, **SPECIAL, **sizes, **settings))


def induction_model():
    """A LLaMA with weights set by hand that looks up by its rotary attention alone, at any length.

    Its first layer attends to the token before and notes which that was; the second attends to where its own token was noted and
    says the token that stands there. The base is so large that only the first ten or so of the 64 pairs of a head rotate: these find
    the token before, the others compare tokens.
    """
    head, words = 128, WORDS
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=4 * words,  # own token | the one before | the answer | constant
            head_dim=head,
            num_attention_heads=1,
            num_hidden_layers=2,
            intermediate_size=8,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e30},
            tie_word_embeddings=False,
        )
    ).eval()
    own, before, answer, constant = (slice(words * part, words * (part + 1)) for part in range(4))
    each = torch.eye(words)
    still = slice(16, 16 + words)  # pairs that stand still: dimensions i and i + 64
    turning = torch.arange(10)
    frequencies = 1e30 ** (-turning / (head / 2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1 if "norm" in name else 0)
        model.model.embed_tokens.weight[:, own] = each
        model.model.embed_tokens.weight[:, constant] = 1
        first, second = (layer.self_attn for layer in model.model.layers)
        # q R(distance) k is greatest one token back
        first.q_proj.weight[turning, constant.start] = 50 * torch.cos(frequencies)
        first.q_proj.weight[turning + head // 2, constant.start] = -50 * torch.sin(frequencies)
        first.k_proj.weight[turning, constant.start] = 50
        first.v_proj.weight[:words, own] = each
        first.o_proj.weight[before, :words] = each
        second.q_proj.weight[still, own] = 50 * each
        second.k_proj.weight[still, before] = 50 * each
        second.v_proj.weight[:words, own] = each
        second.o_proj.weight[answer, :words] = each
        model.lm_head.weight[:, answer] = each
    return model


def test_perfect_and_perverse_lookup():
    model = spy()
    result = key_value(model, [19, 64], pairs=8, trials=10)
    assert result.accuracy == 1
    assert result.chance == 1 / 8
    assert [(cell.length, cell.depth) for cell in result.cells] == [
        (length, depth) for length in (19, 64) for depth in (0, 0.25, 0.5, 0.75, 1)
    ]
    assert all(cell.trials == 10 and cell.high == 1 for cell in result.cells)
    model.look_up = False
    assert key_value(model, [19, 64], pairs=8, trials=10).accuracy == 0


@pytest.mark.parametrize("length", [19, 20, 33, 64])
@pytest.mark.parametrize(("depth", "place"), [(0, lambda length: 0), (0.5, lambda length: round((length - 3) / 2)), (1, lambda length: length - 3)])  # fmt: skip
def test_a_context_holds_what_it_should(length, depth, place):
    model = spy()
    key_value(model, [length], depths=[depth], pairs=8, trials=20)
    rows = [row for ids, _ in model.given for row in ids.tolist()]
    assert len(rows) == 20
    assert len(set(map(tuple, rows))) == 20
    for row in rows:
        assert len(row) == length
        assert not set(row) & {0, 1, 2, 3}
        assert row.index(row[-1]) == place(length)
        assert row.count(row[-1]) == 2
        assert row.count(row[place(length) + 1]) == 1


def test_noise_keys_and_values_are_disjoint():
    model = spy()
    key_value(model, [64], depths=[0.5], pairs=4, trials=1, vocabulary=range(10, 19))  # 4 keys, 4 values, 1 noise
    row = model.given[0][0][0].tolist()
    noise = max(set(row), key=row.count)
    rest = [token for token in row[:-1] if token != noise]
    assert row.count(noise) == 64 - 8 - 1
    assert len(rest) == len(set(rest)) == 8
    assert set(row) == set(range(10, 19))


def test_other_values_are_no_answer_and_ties_are_guesses():
    model = spy()
    model.look_up = False
    model.forward = lambda input_ids, **_: CausalLMOutputWithPast(logits=torch.zeros(len(input_ids), 1, WORDS))
    result = key_value(model, [32], pairs=4, trials=200)
    assert 0.2 < result.accuracy < 0.3  # 1,000 trials at 1 in 4


def test_a_model_that_copies_is_told_from_one_that_does_not():
    model = induction_model()
    able = key_value(model, [32, 128], trials=10)
    assert able.accuracy == 1
    # (the probe of a patch finds no difference: in its eight tokens there is nothing to look up)
    # interpolated by 4, attention to the token before falls on the one four back; the fast pairs that yarn keeps find it still
    with hfpos.patched(model, "linear", factor=4, prove=False):
        assert key_value(model, [32, 128], trials=10).accuracy < 0.5
    with hfpos.patched(model, "yarn", factor=4, prove=False):
        assert key_value(model, [32, 128], trials=10).accuracy == 1
    unable = key_value(tiny("llama"), [32, 128], trials=20)
    low, high = 0.125 - 0.08, 0.125 + 0.08  # 200 trials
    assert low < unable.accuracy < high


def test_only_the_last_logits_are_asked_for():
    model, given = tiny("llama"), {}
    forward = model.forward

    def keep(input_ids=None, logits_to_keep=0, **kwargs):
        output = forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)
        given.setdefault("shapes", []).append(tuple(output.logits.shape))
        return output

    model.forward = keep
    key_value(model, [32], depths=[0.5], trials=3)
    assert given["shapes"] == [(3, 1, model.config.vocab_size)]


def test_batches_change_nothing(monkeypatch):
    model = tiny("llama")
    together = key_value(model, [32, 48], trials=6)
    monkeypatch.setattr(importlib.import_module("hfpos.evaluate.key_value"), "BATCH_TOKENS", 1)
    assert key_value(model, [32, 48], trials=6) == together


def test_rows_to_learn_from_repeat_themselves():
    for row in copying(50, 48, range(100, 200), seed=1):
        assert len(row) == 48
        assert any(row[step:] == row[:-step] for step in range(3, 13))
        assert set(row) <= set(range(100, 200))
    assert copying(2, 40, range(9), seed=1) != copying(2, 40, range(9), seed=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": 1}, "pairs=1: expected a whole number of 2 or more"),
        ({"lengths": [18]}, "8 pairs and the question do not fit into 18 tokens at every depth; expected 19 or more"),
        ({"vocabulary": range(4, 20)}, "vocabulary: 16 ids that are not special, expected 17 or more"),
        ({"vocabulary": range(20)}, "vocabulary: 16 ids that are not special"),
        ({"vocabulary": [5, WORDS]}, "vocabulary has 40; expected ids from 0 to 39"),
        ({"lengths": []}, "lengths="),
        ({"depths": [1.5]}, "depths="),
        ({"trials": 0}, "trials=0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(PatchError, match=message):
        key_value(spy(), **{"lengths": [32], **arguments})


def test_a_table_of_positions_has_an_end():
    with pytest.raises(PatchError, match="64 learned positions, 65 were asked for"):
        key_value(tiny("gpt2"), [32, 65])


def test_a_model_without_a_head_is_refused():
    with pytest.raises(PatchError, match="no language modelling head; load it with AutoModelForCausalLM"):
        key_value(AutoModel.from_config(tiny("llama").config), [32])


def test_logits_that_are_no_numbers_are_named():
    model = tiny("llama")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(PatchError, match="logits at length 32, depth 0.5, trial 0 are not finite"):
        key_value(model, [32], depths=[0.5])
