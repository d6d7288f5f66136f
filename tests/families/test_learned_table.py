"""Decoders with a learned table: resized, behind the rows that are not of positions; and what is refused."""

import pytest
import torch
from transformers import BartForCausalLM, BioGptForCausalLM, GPTNeoForCausalLM, OPTForCausalLM

import hfpos
from tests.pairs import tokens, unpatched
from tests.state import State, logits


CLASSES = {"opt": OPTForCausalLM, "biogpt": BioGptForCausalLM, "bart": BartForCausalLM, "gpt_neo": GPTNeoForCausalLM}
OFFSETS = {"opt": 2, "biogpt": 2, "bart": 2, "gpt_neo": 0}
LONGER = {"target_length": 80}


def table(model):
    return next(module for name, module in model.named_modules() if name.endswith(("embed_positions", "wpe")))


def resized(model_type, **parameters):
    return hfpos.patch(unpatched(model_type), "learned", **LONGER | parameters)


@pytest.mark.parametrize("init", ["copy", "tile", "interpolate"])
@pytest.mark.parametrize("model_type", CLASSES)
def test_rows(model_type, init):
    first = OFFSETS[model_type]
    trained = table(unpatched(model_type)).weight
    model = resized(model_type, init=init)
    rows = table(model).weight
    assert rows.shape == (80 + first, 64)
    assert trained.shape == (32 + first, 64)
    assert rows.requires_grad
    assert table(model).num_embeddings == 80 + first
    assert torch.equal(rows[:first], trained[:first])
    own, old = rows[first:].detach(), trained[first:].detach()
    expected = {
        "copy": torch.cat((old, old.mean(0).expand(48, -1))),
        "tile": old[torch.arange(80) % 32],
        "interpolate": torch.stack(
            [
                old[int(r)] * (1 - r % 1) + old[min(int(r) + 1, 31)] * (r % 1)
                for r in (row * 31 / 79 for row in range(80))
            ]
        ),
    }[init]
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
    if init != "interpolate":
        assert torch.equal(logits(model), logits(unpatched(model_type)))


@pytest.mark.parametrize("model_type", CLASSES)
def test_it_is_a_stock_model_again(model_type, tmp_path):
    model = resized(model_type)
    assert model.config.max_position_embeddings == 80
    model.save_pretrained(tmp_path)
    loaded = CLASSES[model_type].from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "hfpos")
    assert torch.equal(table(loaded).weight, table(model).weight)
    assert torch.equal(logits(loaded, 79), logits(model, 79))


@pytest.mark.parametrize("model_type", CLASSES)
def test_unpatched_again(model_type):
    model = unpatched(model_type)
    before = State(model)
    hfpos.patch(model, "learned", **LONGER)
    hfpos.unpatch(model)
    assert before.differences(State(model)) == []


@pytest.mark.parametrize("model_type", CLASSES)
@torch.no_grad()
def test_rows_are_read_where_tokens_stand(model_type):
    """Padding, packing and gaps; decoding too. Some of these decoders know positions as a count only."""
    model, ids = resized(model_type, init="interpolate"), tokens(2, 41)
    whole = model(ids).logits
    padded, mask = torch.nn.functional.pad(ids, (6, 0)), torch.nn.functional.pad(torch.ones_like(ids), (6, 0))
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 6:], whole, rtol=0, atol=2e-5)
    first = model(padded[:, :40], attention_mask=mask[:, :40], use_cache=True)
    rest = model(padded[:, 40:], attention_mask=mask, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 34:], rtol=0, atol=2e-5)
    places = torch.cat([torch.arange(20), torch.arange(21)])[None]
    apart = torch.cat([model(ids[:1, :20]).logits, model(ids[:1, 20:]).logits], dim=1)
    torch.testing.assert_close(model(ids[:1], position_ids=places).logits, apart, rtol=0, atol=2e-5)
    rows = table(model).weight.clone()
    table(model).weight[OFFSETS[model_type] + 60 :] = 0
    shifted = model(ids, position_ids=torch.arange(39, 80)[None]).logits
    table(model).weight.copy_(rows)
    assert not torch.allclose(shifted, model(ids, position_ids=torch.arange(39, 80)[None]).logits, atol=1e-2)


@pytest.mark.parametrize("scheme", ["yarn", "alibi", "dynamic"])
def test_attention_off_the_interface_is_refused_with_what_works(scheme):
    parameters = {"yarn": {"factor": 2.0}}.get(scheme, {})
    with pytest.raises(hfpos.PatchError, match=rf"'{scheme}' .*MvpForCausalLM .*; use sinusoidal, learned or nope"):
        hfpos.patch(unpatched("mvp"), scheme, **parameters)
    assert hfpos.describe(hfpos.patch(unpatched("mvp"), "sinusoidal")).proved


def test_a_table_of_sinusoids_is_native_as_that():
    assert "sinusoidal" in str(hfpos.describe(unpatched("marian")))


@torch.no_grad()
def test_opt_whose_embeddings_are_narrower_than_its_layers():
    model, ids = unpatched("opt", word_embed_proj_dim=32), tokens(2, 41)
    hfpos.patch(model, "sinusoidal")
    whole = model(ids).logits
    steps = model(ids[:, :30], use_cache=True)
    rest = model(ids[:, 30:], past_key_values=steps.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 30:], rtol=0, atol=2e-5)
    assert hfpos.patch(model, "learned", **LONGER).model.decoder.embed_positions.weight.shape == (82, 64)
