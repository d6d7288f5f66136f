"""The head run on a few hidden states at a time, the decoder in pieces: the same losses, and never all logits."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

import hfpos
from hfpos.evaluate import scoring
from hfpos.evaluate.scoring import TokenScorer
from tests.tiny import tiny


MODELS = [
    "llama",
    "gemma2",
    "cohere",
    "granite",
    "gpt2",
    "bloom",
    "opt",
    "qwen3_moe",
    "gemma3n_text",
    "mpt",
    "mamba",
    "jamba",
]
RECURRENT = ("mamba", "jamba")  # in Transformers 5.23 their state does not go on in a second piece of several tokens


def ids_for(model, rows=2, tokens=70):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, model.config.get_text_config().vocab_size, (rows, tokens), generator=generator)


@torch.no_grad()
def all_at_once(model, ids):
    logits = model(ids, use_cache=False).logits[:, :-1].double()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.fixture
def small_budget(monkeypatch):
    """Logits of 16 tokens and pieces of 16 tokens, so that short rows are divided as long ones are."""
    monkeypatch.setattr(scoring, "LOGITS", 1)
    monkeypatch.setattr(scoring, "MASK_ENTRIES", 1)
    monkeypatch.setattr(scoring, "WHOLE", 8)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("start", [1, 41])
def test_divided_equals_whole(model_type, start, small_budget):
    model = tiny(model_type)
    ids = ids_for(model, tokens=60)
    expected = all_at_once(model, ids)[:, start - 1 :]
    for chunk, dependent in ((None, False), (None, True), (7, False)):
        if chunk and model_type in RECURRENT:
            with pytest.raises(hfpos.PatchError, match="cannot be run in pieces of 7 tokens"):
                TokenScorer(model, chunk, dependent).losses(ids, start)
        else:
            found = TokenScorer(model, chunk, dependent).losses(ids, start)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_head_never_sees_a_whole_row(small_budget):
    model, seen = tiny("llama"), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    for dependent in (False, True):
        TokenScorer(model, None, dependent).losses(ids_for(model, tokens=200), 1)
    assert max(seen) == 16


def test_only_scored_tokens_get_logits():
    model, seen = tiny("llama"), []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    TokenScorer(model, None, False).losses(ids_for(model, tokens=60), 50)
    assert seen == [10]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call
def test_wrapped_models(small_budget):
    model = tiny("llama")
    peft = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    )
    ids = ids_for(model)
    scorer = TokenScorer(peft.eval(), None, False)
    torch.testing.assert_close(scorer.losses(ids, 1), all_at_once(peft, ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scorer.losses(ids, 1), all_at_once(model, ids))


def test_nothing_of_it_stays_on_the_model(small_budget):
    model = hfpos.patch(tiny("llama"), "alibi")
    decoder = model.get_decoder()
    before = (dict(decoder.__dict__), dict(decoder._forward_hooks), model.training)
    TokenScorer(model, None, False).losses(ids_for(model), 1)
    assert (dict(decoder.__dict__), dict(decoder._forward_hooks), model.training) == before


def test_a_head_that_looks_at_its_neighbours_is_not_divided(small_budget):
    """A model whose head is not the same for each token alone is noticed, and run whole."""
    model = tiny("llama")
    mix = model.lm_head.forward
    model.lm_head.forward = lambda hidden: mix(hidden.cumsum(1))
    assert TokenScorer(model, None, False)._abilities == (False, False)
