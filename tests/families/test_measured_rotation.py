"""The score seam takes a model's rotation over, wherever in a head and in whichever layers it is, against the same frequencies put in by the freq seam."""

import pytest
import torch

import hfpos
from hfpos.families import family_of
from hfpos.families._measured_rotation import measure_rotation
from hfpos.positions import PositionHook
from hfpos.probe import probe
from hfpos.schemes import Dynamic
from tests.pairs import ORIGINAL, difference, tokens, unpatched


FULL, SLIDING = "full_attention", "sliding_attention"
# How each rotates: MLA behind what is not rotated, by halves and by neighbours; complex numbers and a norm after them; sliding layers only.
MODELS = {
    "llama": ({}, "half", {0, 1}),
    "gpt_neox": ({}, "half", {0, 1}),
    "deepseek_v2": ({}, "interleaved_last", {0, 1}),
    "deepseek_v3": ({}, "half_last", {0, 1}),
    "llama4_text": ({"no_rope_layers": [1, 0]}, "interleaved", {0}),
    "smollm3": ({"no_rope_layers": [0, 1]}, "half", {1}),
    "cohere2": ({"layer_types": [FULL, SLIDING], "sliding_window": 64}, "interleaved", {1}),
    "gemma3_text": ({"layer_types": [SLIDING, FULL]}, "half", {1}),
}


def seam_of(model):
    hooks = (getattr(hook, "__self__", None) for hook in family_of(model).decoder._forward_pre_hooks.values())
    return next(hook.seam for hook in hooks if isinstance(hook, PositionHook))


@pytest.mark.parametrize("model_type", MODELS)
def test_what_is_measured(model_type):
    overrides, convention, layers = MODELS[model_type]
    model, ids = unpatched(model_type, **overrides), tokens(1, 20)
    before = model(ids).logits
    family = family_of(model)
    assert measure_rotation(family, lambda positions: probe(family, positions)) == (convention, layers)
    assert torch.equal(model(ids).logits, before)  # and it leaves no trace
    seam = seam_of(hfpos.patch(model, "dynamic", factor=4))
    assert (seam.convention, seam.layers) == (convention, layers)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_last_token_is_rotated_as_a_theta_of_that_length_does(model_type):
    """In the last layer that rotates; before it, tokens at other lengths have other frequencies, so one layer is all that there is."""
    overrides, _, layers = MODELS[model_type]
    one = {key: [value[max(layers)]] if isinstance(value, list) else value for key, value in overrides.items()}
    if model_type in ("smollm3", "llama4_text"):
        one["layer_types"] = [FULL]
    if model_type == "deepseek_v3":
        one["first_k_dense_replace"] = 1
    length, ids = 57, tokens(2, 57)
    scaled = unpatched(model_type, num_hidden_layers=1, **one)
    family = family_of(scaled)
    geometry = family.geometry()
    frequencies, _ = Dynamic(factor=4).frequencies_at(geometry, torch.tensor(length))
    pairs = geometry.rotary_dim // 2
    theta = float(frequencies[1] ** (-pairs))
    assert length > ORIGINAL
    expected = hfpos.patch(scaled, "abf", theta=theta, target_length=128)(ids).logits[:, -1]
    model = hfpos.patch(unpatched(model_type, num_hidden_layers=1, **one), "dynamic", factor=4)
    assert difference(model(ids).logits[:, -1], expected) < 1e-5


def test_a_norm_with_weights_after_the_rotation_is_no_rotation():
    model, ids = unpatched("hunyuan_v1_dense"), tokens(1, 20)
    before = model(ids).logits
    with pytest.raises(hfpos.PatchError, match="does something else to its queries than rotating them"):
        hfpos.patch(model, "self_extend", factor=4)
    assert torch.equal(model(ids).logits, before)


def test_where_only_near_tokens_are_seen_a_remapping_is_refused():
    model = unpatched("mistral", sliding_window=6)
    with pytest.raises(hfpos.PatchError, match="see the last 6 tokens only"):
        hfpos.patch(model, "self_extend", factor=4)
    hfpos.patch(model, "self_extend", factor=16, window=4)
