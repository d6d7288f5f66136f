"""GPT-2: its table resized, or switched off with something else in its place."""

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.cache_utils import DynamicCache

import hfpos
from tests.pairs import Pair, tokens, unpatched
from tests.state import logits


FACTOR = {"factor": 4.0}


@pytest.mark.parametrize("target_length", [33, 64, 100, 16])
def test_resized_table(target_length):
    trained = unpatched("gpt2").transformer.wpe.weight
    tables = {}
    for init in ("copy", "tile", "interpolate"):
        model = Pair("gpt2", "learned", {"target_length": target_length, "init": init}).model()
        table = model.transformer.wpe
        assert table.weight.shape == (target_length, 64)
        assert type(table) is torch.nn.Embedding
        assert (table.num_embeddings, table.weight.requires_grad) == (target_length, True)
        assert (model.config.n_positions, model.config.max_position_embeddings) == (target_length, target_length)
        tables[init] = table.weight.detach()
        assert torch.isfinite(logits(model, target_length)).all()
    kept = min(target_length, 32)
    for init in ("copy", "tile"):
        assert torch.equal(tables[init][:kept], trained[:kept])
    for row in range(32, target_length):
        assert torch.equal(tables["tile"][row], trained[row % 32])
        torch.testing.assert_close(tables["copy"][row], trained.mean(0))
    stretched = tables["interpolate"]
    torch.testing.assert_close(stretched[[0, -1]], trained[[0, -1]])  # the ends stay
    for row in range(target_length):
        place = row * 31 / (target_length - 1)
        low, part = int(place), place - int(place)
        expected = trained[low] * (1 - part) + trained[min(low + 1, 31)] * part
        torch.testing.assert_close(stretched[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("init", ["copy", "tile"])
def test_resized_model_is_bit_equal_within_the_trained_length(init):
    model = Pair("gpt2", "learned", {"target_length": 64, "init": init}).model()
    assert torch.equal(logits(model, 32), logits(unpatched("gpt2"), 32))


def test_resized_model_is_a_stock_model(tmp_path):
    model = Pair("gpt2", "learned", {"target_length": 64}).model()
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, 64), logits(model, 64))
    assert not hasattr(loaded.config, "hfpos")


@pytest.mark.parametrize("scheme", ["rope", "alibi", "nope", "sinusoidal", "dynamic"])
def test_own_table_is_off(scheme):
    """Neither its weights nor its length matter any more."""
    model = Pair("gpt2", scheme).model()
    expected = logits(model, 100)
    with torch.no_grad():
        model.transformer.wpe.weight.normal_()
    assert torch.equal(logits(model, 100), expected)
    assert not model.transformer.wpe.weight.requires_grad
    model(tokens(1, 40), labels=tokens(1, 40)).loss.backward()
    assert model.transformer.wpe.weight.grad is None
    assert hfpos.unpatch(model).transformer.wpe.weight.requires_grad


def test_keys_are_cached_rotated():
    """So that nothing is rotated twice: each layer's cached keys are those of the unrotated model, turned by their positions."""
    caches = {}
    for scheme in ("rope", "nope"):
        model = hfpos.patch(unpatched("gpt2", n_layer=1), scheme)
        caches[scheme] = DynamicCache()
        with torch.no_grad():
            model(tokens(1, 20), past_key_values=caches[scheme])
    rotated, plain = (cache.layers[0].keys for cache in caches.values())
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    turn = torch.polar(torch.ones(20, 8), torch.arange(20)[:, None] * frequencies)
    expected = torch.view_as_real(torch.complex(plain[..., :8], plain[..., 8:]) * turn)
    torch.testing.assert_close(rotated, torch.cat((expected[..., 0], expected[..., 1]), -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["rope", "alibi"])
def test_only_distances_count(scheme):
    model = Pair("gpt2", scheme).model()
    with torch.no_grad():
        shifted = model(tokens(2, 30), position_ids=torch.arange(100, 130)[None]).logits
    torch.testing.assert_close(shifted, logits_of(model), rtol=0, atol=1e-4)


@torch.no_grad()
def logits_of(model):
    return model(tokens(2, 30)).logits


def test_scaled_attention_of_gpt2_is_kept():
    """Its options that change the scale of the logits hold under a rotation too."""
    for option in ("scale_attn_by_inverse_layer_idx", "scale_attn_weights"):
        settings = {option: option == "scale_attn_by_inverse_layer_idx"}
        rope = hfpos.patch(unpatched("gpt2", **settings), "rope", theta=1e30)  # all pairs but the first stand still
        nope = hfpos.patch(unpatched("gpt2", **settings), "nope")
        plain = hfpos.patch(unpatched("gpt2"), "rope", theta=1e30)
        assert not torch.allclose(logits(rope), logits(plain), atol=1e-2)
        with torch.no_grad():
            first = [model(tokens(2, 1)).logits for model in (rope, nope)]  # one token: no distance
        torch.testing.assert_close(*first, rtol=0, atol=1e-5)
