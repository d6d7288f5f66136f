"""Phi-3.5-MoE: its rotary module goes by the frequencies that were put in, not by its config."""

import pytest
import torch

import hfpos
from tests.pairs import tokens, unpatched


FREQUENCIES = 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e6,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + i for i in range(8)],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 16,
}


def reference(scale):
    """A stock model whose rotary module gives cos and sin of the unscaled frequencies times `scale`, from float64."""
    model = unpatched("phimoe")

    def forward(x, position_ids):
        angles = position_ids[..., None].double() * FREQUENCIES.repeat(2) * scale
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    model.model.rotary_emb.forward = forward
    return model


@pytest.mark.parametrize("scheme", ["linear", "nope", "rope"])
@torch.no_grad()
def test_logits_are_those_of_the_frequencies(scheme):
    parameters = {"linear": {"factor": 4.0}}.get(scheme, {})
    model = hfpos.patch(unpatched("phimoe"), scheme, **parameters)
    expected = reference({"linear": 0.25, "nope": 0.0, "rope": 1.0}[scheme])
    torch.testing.assert_close(model(tokens(2, 41)).logits, expected(tokens(2, 41)).logits, rtol=0, atol=5e-5)


@torch.no_grad()
def test_its_own_scaling_is_replaced_and_comes_back():
    model = unpatched("phimoe", rope_parameters=LONGROPE)
    before = model(tokens(1, 30)).logits
    assert not torch.allclose(before, reference(1.0)(tokens(1, 30)).logits, atol=1e-2)
    hfpos.patch(model, "linear", factor=4.0)
    torch.testing.assert_close(model(tokens(1, 30)).logits, reference(0.25)(tokens(1, 30)).logits, rtol=0, atol=5e-5)
    assert model.config.max_position_embeddings == 64
    assert torch.equal(hfpos.unpatch(model)(tokens(1, 30)).logits, before)
