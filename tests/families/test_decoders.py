"""Decoders whose attention or positions are of their own kind: patched, they compute what a dense float64 reference does."""

import math

import pytest
import torch
from transformers import StaticCache

import hfpos
from hfpos.schemes.sinusoidal import Sinusoidal
from tests.families.dense import KINDS, dense, plain, turned, with_bias
from tests.pairs import checkpointing, tokens, unpatched
from tests.state import State


LENGTH = 41  # beyond the 32 tokens the models were "trained" at
INTERLEAVED = ("gptj", "codegen")
PARTS = {"gptj": 8, "codegen": 8, "stablelm": 4, "nemotron": 8, "falcon": 16, "gpt_neox_japanese": 16}


def stock(model_type, **settings):
    """A tiny model without dropout, of 32 positions."""
    own = {
        "falcon": {"alibi": False},
        "xglm": {"attention_heads": 4},
        "gemma4_text": {"max_position_embeddings": 64},
    } | dict.fromkeys(INTERLEAVED, {"rotary_dim": 8})
    model = unpatched(model_type, **own.get(model_type, {}) | settings)
    for module in model.modules():
        for name in [
            name for name, value in vars(module).items() if name == "p" or ("drop" in name and type(value) is float)
        ]:
            setattr(module, name, 0.0)
    return model


def theta(model):
    return (getattr(model.config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)


def frequencies(model, base=None):
    """Those of the model itself; of whole heads where it rotates nothing."""
    width = PARTS.get(model.config.model_type, 16)
    return (base or theta(model)) ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def rope(model, factor=1.0):
    return turned(frequencies(model) / factor, interleaved=model.config.model_type in INTERLEAVED)


def dynamic(model):
    """Frequencies of the length of each query, past 32 tokens."""
    own, base = frequencies(model), theta(model)
    width = 2 * len(own)

    def sets(length):
        alpha = 2.0 * length / 32 - 1.0
        return (own if length <= 32 else frequencies(model, base * alpha ** (width / (width - 2)))), 1.0

    return turned(sets, interleaved=model.config.model_type in INTERLEAVED)


def alibi(model):
    places = torch.arange(LENGTH, dtype=torch.float64)
    slopes = 0.25 ** torch.arange(1, 5, dtype=torch.float64)
    return with_bias(-slopes[:, None, None] * (places[:, None] - places))


SCHEMES = {
    "linear": ({"factor": 2.0}, lambda model: rope(model, 2.0)),
    "alibi": ({}, alibi),
    "dynamic": ({"factor": 2.0}, dynamic),
    "nope": ({}, lambda model: plain),
}


def patched(model_type, scheme, **settings):
    return hfpos.patch(stock(model_type, **settings), scheme, **SCHEMES.get(scheme, ({}, None))[0])


def close(found, expected, tolerance=2e-5, least=0.0):
    largest = max(expected.abs().max().item(), least)
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model_type", KINDS)
def test_outputs_and_gradients_are_those_of_the_reference(model_type, scheme):
    expected = dense(stock(model_type), SCHEMES[scheme][1](stock(model_type)))
    model, ids = patched(model_type, scheme), tokens(1, LENGTH)
    logits = {each: each(ids, use_cache=False).logits for each in (model, expected)}
    close(logits[model], logits[expected])
    for values in logits.values():
        values.logsumexp(-1).sum().backward()
    theirs = dict(expected.named_parameters())
    for name, mine in model.named_parameters():
        if mine.grad is not None:
            close(mine.grad, theirs[name].grad, 1e-4, least=0.1)


def padded(length=LENGTH):
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    ids[1, :5], mask[1, :5] = 0, 0
    return ids, mask


@pytest.mark.parametrize("scheme", [*SCHEMES, "sinusoidal"])
@pytest.mark.parametrize("model_type", [*KINDS, "phimoe"])
def test_caches_padding_packing(model_type, scheme):
    model, (ids, mask) = patched(model_type, scheme), padded()
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        close(whole[1, 5:], model(ids[1:, 5:]).logits[0])
        caches = {"default": None}
        if model_type != "bart":
            caches["static"] = StaticCache(model.config, max_cache_len=LENGTH + 3)
        for cache in caches.values():
            steps, start = [], 0
            for step in (17, 20, 1, 3):
                seen = mask[:, : start + step]
                output = model(
                    ids[:, start : start + step], attention_mask=seen, past_key_values=cache, use_cache=True
                )
                cache = output.past_key_values
                steps.append(output.logits)
                start += step
            close(torch.cat(steps, dim=1)[mask.bool()], whole[mask.bool()])
        roomy = StaticCache(model.config, max_cache_len=LENGTH + 3) if model_type != "bart" else None
        close(model(ids[:1, :20], past_key_values=roomy, use_cache=True).logits, whole[:1, :20])
        row, places = tokens(1, 36), torch.cat([torch.arange(13), torch.arange(23)])[None]
        apart = torch.cat([model(row[:, :13]).logits, model(row[:, 13:]).logits], dim=1)
        close(model(row, position_ids=places).logits, apart)
    if model_type != "phimoe":  # which draws in training
        close(model.train()(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize(
    "model_type", [name for name in KINDS if name != "gpt_neox_japanese"]
)  # which knows no checkpointing
def test_checkpointed_gradients(model_type):
    """Each layer is computed anew with the positions of its own forward, not of the last one."""
    gradients = []
    for again in (False, True):
        model = patched(model_type, "alibi")
        if again:
            checkpointing(model)
        ids, mask = padded(37)
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        with torch.no_grad():
            model(tokens(1, 9), use_cache=False)
        loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-4, least=0.1)


@pytest.mark.parametrize("scheme", ["linear", "alibi"])
@pytest.mark.parametrize("model_type", [*KINDS, "phimoe"])
def test_unpatched_again_it_is_what_it_was(model_type, scheme):
    model = stock(model_type)
    before = State(model)
    hfpos.patch(model, scheme, **SCHEMES.get(scheme, ({}, None))[0])
    hfpos.unpatch(model)
    assert before.differences(State(model)) == []


@pytest.mark.parametrize("model_type", [*KINDS, "phimoe"])
@torch.no_grad()
def test_saved_and_loaded(model_type, tmp_path):
    model = patched(model_type, "linear")
    model.save_pretrained(tmp_path)
    loaded = hfpos.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    ids, mask = padded()
    assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("model_type", KINDS)
@torch.no_grad()
def test_generation_and_bfloat16(model_type):
    model, (ids, mask) = patched(model_type, "alibi"), padded(33)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=2, do_sample=False, pad_token_id=0)
    alone = model.generate(ids[1:, 5:], max_new_tokens=5, num_beams=2, do_sample=False, pad_token_id=0)
    assert torch.equal(found[1, 33:][: alone.shape[1] - 28], alone[0, 28:])
    exact = model(ids, attention_mask=mask).logits[mask.bool()]
    rounded = model.bfloat16()(ids, attention_mask=mask).logits[mask.bool()]
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("model_type", [*KINDS, "gemma3n_text", "gemma4_text"])
@torch.no_grad()
def test_sinusoids_are_added_to_the_token_embeddings(model_type):
    """Gemma 3n and 4 look token ids up in each layer too."""
    model, ids = patched(model_type, "sinusoidal"), tokens(2, LENGTH)
    expected = hfpos.patch(stock(model_type), "nope")
    rows = Sinusoidal(64)(torch.arange(LENGTH))
    embedding = expected.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: output + rows)
    close(model(ids).logits, expected(ids).logits)
    assert math.isclose(rows[40, 0].item(), math.sin(40), rel_tol=1e-6)
