"""Where attention looks: against the weights of a stock model counted one by one, and against what a scheme must do to them."""

import pytest
import torch

import hfpos
from hfpos.data.documents import TokenizedDocument
from hfpos.evaluate.attention_profile import attention_profile
from tests.state import logits
from tests.tiny import tiny


def documents(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [
        TokenizedDocument(str(number), torch.randint(3, 120, (size,), generator=generator))
        for number, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("scheme", [None, "alibi", "yarn", "nope", "dynamic"])
def test_it_is_the_mean_over_pairs_counted_one_by_one(scheme):
    model, texts = tiny("llama"), documents(33, 40, 20)
    reference = tiny("llama")
    if scheme:
        parameters = {"factor": 4} if scheme in ("yarn", "dynamic") else {}
        hfpos.patch(model, scheme, **parameters)
        hfpos.patch(
            reference, scheme, **parameters, **({"backend": "eager"} if scheme in ("alibi", "dynamic") else {})
        )
    model.train()
    before = logits(model), model.config._attn_implementation
    found = attention_profile(model, texts, 33)
    assert model.training
    assert torch.equal(logits(model), before[0])
    assert model.config._attn_implementation == before[1]
    assert (found.length, found.layers, len(found.heads)) == (33, 2, 8)
    reference.eval().set_attn_implementation("eager")
    sums, counts = torch.zeros(8, len(found.distances)), torch.zeros(len(found.distances))
    for text in texts[:2]:  # the third is too short
        with torch.no_grad():
            weights = torch.cat(reference(text.ids[None, :33], output_attentions=True).attentions, dim=1)[0]
        for i in range(16, 33):
            for j in range(i + 1):
                place = max(index for index, edge in enumerate(found.distances) if edge <= i - j)
                sums[:, place] += weights[:, i, j]
                counts[place] += 1
    torch.testing.assert_close(torch.tensor(found.heads), sums / counts, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(torch.tensor(found.mean()), (sums / counts).mean(0), rtol=1e-4, atol=1e-7)


def test_all_weight_is_counted_once():
    found = attention_profile(tiny("gpt2"), documents(60), 50)
    edges = [*found.distances, 50]
    pairs = [
        sum(max(0, 50 - max(25, distance)) for distance in range(a, b)) for a, b in zip(edges, edges[1:], strict=False)
    ]
    for head in found.heads:
        assert sum(weight * count for weight, count in zip(head, pairs, strict=True)) == pytest.approx(25, rel=1e-5)


def test_alibi_looks_nearer_than_no_positions():
    model, texts = tiny("llama"), documents(64, 64)
    far = {}
    for scheme in ("alibi", "nope"):
        with hfpos.patched(model, scheme):
            far[scheme] = attention_profile(model, texts, 64).mean()[-1]
    assert far["alibi"] < 0.5 * far["nope"]


@pytest.mark.parametrize("length", [1, 41])
def test_what_cannot_be_measured(length):
    with pytest.raises(hfpos.PatchError, match=rf"attention={length} is not usable; .* the longest document has: 40"):
        attention_profile(tiny("llama"), documents(40), length)


def test_a_model_without_weights_is_refused(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr("hfpos.evaluate.attention_profile.attention_by", lambda model, name: torch.no_grad())
    with pytest.raises(hfpos.PatchError, match="LlamaForCausalLM gives no attention weights"):
        attention_profile(model, documents(40), 40)
