"""Attention implementations: they agree, survive the user's choice, and touch nothing that is not patched."""

import pytest
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hfpos
from hfpos.attention.interface import NAMES, PREFIX
from tests.pairs import PAIRS, ROTARY, Pair, difference, tokens, unpatched, use_backend


BACKENDS = ("sdpa", "eager")
LENGTH = 44
INSIDE = [pair for pair in PAIRS if pair.inside_attention]


def call() -> dict[str, torch.Tensor]:
    """A batch with a padded row, and the labels of its tokens but the first, which padding would have to predict."""
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, :7], mask[1, :7] = 0, 0
    labels = ids.clone()
    labels[1, :8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_eager_and_sdpa_agree_with_gradients(pair: Pair) -> None:
    results = []
    for backend in BACKENDS:
        model = use_backend(pair.model(), backend)
        output = model(**call(), use_cache=False)
        output.loss.backward()
        results.append(
            (output.logits[call()["attention_mask"].bool()], [p.grad for p in model.parameters() if p.requires_grad])
        )
    (logits, gradients), (other_logits, other_gradients) = results
    assert difference(logits, other_logits) < 5e-5
    for a, b in zip(gradients, other_gradients, strict=True):
        assert difference(a, b) < 5e-5 * max(b.abs().max().item(), 1)


NOT_CAUSAL = [
    pair
    for pair in [*PAIRS, Pair("llama", "alibi", {"bidirectional": True})]
    if pair.model_type == "llama" and pair.relative and (pair.scheme != "alibi" or "bidirectional" in pair.parameters)
    if pair.scheme != "xpos"  # which refuses
]


@pytest.mark.parametrize("pair", NOT_CAUSAL, ids=str)
@torch.no_grad()
def test_a_model_that_is_not_causal_goes_on_seeing_the_future(pair: Pair) -> None:
    ids, results = tokens(1, LENGTH), []
    other = ids.clone()
    other[0, -1] = ids[0, -1] % 100 + 3
    for backend in BACKENDS:
        model = use_backend(pair.model(is_causal=False), backend)
        results.append(model(ids).logits)
        assert difference(results[-1], model(ids, attention_mask=torch.ones_like(ids)).logits) < 5e-5
        assert difference(results[-1][:, :-1], model(other).logits[:, :-1]) > 1e-3
    assert difference(*results) < 5e-5


@pytest.mark.parametrize("pair", INSIDE, ids=str)
@torch.no_grad()
def test_the_users_choice_keeps_the_scheme(pair: Pair) -> None:
    model = pair.model()
    ids = tokens(1, LENGTH)
    before = model(ids).logits
    use_backend(model, "eager")
    output = model(ids, output_attentions=True)
    assert difference(output.logits, before) < 5e-5
    assert output.attentions[0].shape == (1, 4, LENGTH, LENGTH)
    steps, cache = [], None
    for i in range(LENGTH if not pair.pins_prompt else 0):
        output = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    assert not steps or difference(torch.cat(steps, 1), before) < 5e-5
    use_backend(model, "sdpa")
    assert torch.equal(model(ids).logits, before)


def test_a_model_built_eager_stays_eager() -> None:
    model = hfpos.patch(unpatched("llama").train(False), "alibi")
    eager = unpatched("llama")
    eager.set_attn_implementation("eager")
    hfpos.patch(eager, "alibi")
    ids = tokens(1, 20)
    assert eager(ids, output_attentions=True).attentions[0] is not None
    assert difference(eager(ids).logits, model(ids).logits) < 2e-5
    assert hfpos.unpatch(eager).config._attn_implementation == "eager"


def test_implementations_that_cannot_carry_a_scheme_are_refused() -> None:
    model = hfpos.patch(unpatched("llama"), "dynamic")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(hfpos.PatchError, match="'flex_attention' cannot carry this scheme"):
        model(tokens(1, 5))
    model = unpatched("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(hfpos.PatchError, match="'flex_attention' cannot carry this scheme"):
        hfpos.patch(model, "dynamic")
    for backend in ("flex", "flash_attention_2", "sdpaa"):
        with pytest.raises(hfpos.PatchError, match=f"'{backend}' cannot carry this scheme.*Available: "):
            hfpos.patch(unpatched("llama"), "dynamic", backend=backend)
    with pytest.raises(hfpos.PatchError, match="backend='sdpa' has no meaning for it"):
        hfpos.patch(unpatched("llama"), "yarn", factor=2, backend="sdpa")


def test_functions_are_registered_in_pairs_under_harmless_names() -> None:
    for name in NAMES.values():
        assert name.startswith(PREFIX)
        assert name in ALL_ATTENTION_FUNCTIONS
        assert name in ALL_MASK_ATTENTION_FUNCTIONS
        assert "flash" not in name
        assert "/" not in name
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is transformers.integrations.sdpa_attention.sdpa_attention_forward


@pytest.mark.parametrize("model_type", [*ROTARY, "gpt2", "bloom"])
@torch.no_grad()
def test_a_second_model_of_the_class_stays_as_it_was(model_type: str) -> None:
    ids = tokens(1, 20)
    expected = unpatched(model_type)(ids).logits
    other = unpatched(model_type)
    patched = hfpos.patch(unpatched(model_type), "nope" if model_type == "bloom" else "alibi")
    assert torch.equal(other(ids).logits, expected)
    assert difference(patched(ids).logits, expected) > 1e-2
    assert torch.equal(unpatched(model_type)(ids).logits, expected)


@torch.no_grad()
def test_attention_to_an_encoder_is_left_alone() -> None:
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, add_cross_attention=True, initializer_range=0.3
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    encoded = torch.randn(1, 9, 32)
    seen = []
    model.transformer.h[0].crossattention.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    for scheme in ("nope", "alibi", "rope", "dynamic"):
        hfpos.patch(model, scheme)
        # a single token sees only itself, wherever it stands: the encoder is asked with the same query under every scheme
        model(tokens(1, 1) % 64, encoder_hidden_states=encoded, position_ids=torch.tensor([[40]]))
    assert len(seen) == 4
    assert all(difference(output, seen[0]) < 1e-6 for output in seen)


def test_a_layer_without_positions_is_refused() -> None:
    attention = ALL_ATTENTION_FUNCTIONS[PREFIX + "sdpa"]
    q = torch.randn(1, 4, 3, 16)
    with pytest.raises(hfpos.PatchError, match="called without the positions of its tokens"):
        attention(torch.nn.Identity(), q, q, q, None)
