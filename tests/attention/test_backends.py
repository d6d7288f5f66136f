"""Whatever attention implementation a model stands on, and however it is chosen, the bias is there and its cache is the stock one."""

import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import hfpos
from tests.attention.exact import HEADS, WIDTH, formula
from tests.pairs import Pair, difference, tokens, unpatched, use_backend
from tests.test_compile import check_decoding, model_of


LENGTH = 40
SCHEMES = ["alibi", "kerple", "sandwich", "t5", "fire", "shaw"]
MODELS = ["llama", "gpt2", "bloom"]
each_model = pytest.mark.parametrize("model_type", MODELS)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def padded(length: int = LENGTH) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, :7] = 0
    return {"input_ids": tokens(2, length), "attention_mask": mask}


@each_scheme
@each_model
@torch.no_grad()
def test_attention_weights_carry_the_bias_on_sdpa_too(model_type: str, scheme: str) -> None:
    model = Pair(model_type, scheme).model()
    before = model.config._attn_implementation
    eager = use_backend(Pair(model_type, scheme).model(), "eager")
    for call in ({"input_ids": tokens(1, LENGTH)}, padded()):
        visible = call.get("attention_mask", torch.ones(1, LENGTH)).bool()
        found, expected = model(**call, output_attentions=True), eager(**call, output_attentions=True)
        assert len(found.attentions) == (0 if model_type == "gpt2" else 2)  # whose layers are not told of the wish
        for a, b in zip(found.attentions, expected.attentions, strict=model_type != "gpt2"):
            assert a.shape == (len(visible), HEADS, LENGTH, LENGTH)
            assert difference(a.transpose(1, 2)[visible], b.transpose(1, 2)[visible]) < 2e-5
        assert difference(found.logits[visible], model(**call).logits[visible]) < 5e-5
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("scheme", ["kerple", "fire"])
@torch.no_grad()
def test_the_bias_in_the_weights_is_the_formula(scheme: str) -> None:
    """With queries and keys that are zero, the weights of the first layer are the softmax of the bias itself."""
    model = hfpos.patch(unpatched("llama"), scheme, **({"hidden": 3, "threshold": 50.0} if scheme == "fire" else {}))
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.zero_()
    weights = {
        name.split(".")[-1]: row[0] + 0.3 * torch.randn(row[0].shape)
        for name, row in model.named_parameters()
        if "hfpos_bias" in name
    }
    for name, row in weights.items():
        getattr(model.model.hfpos_bias, name)[0] = row
    positions = torch.arange(LENGTH)
    places = positions[None, None, :, None], positions[None, None, None, :]
    bias = formula(scheme, weights, *places, torch.zeros(1, HEADS, LENGTH, WIDTH).double())
    expected = bias.masked_fill(places[1] > places[0], float("-inf")).softmax(-1)
    for backend in ("sdpa", "eager"):
        found = use_backend(model, backend)(tokens(1, LENGTH), output_attentions=True).attentions[0]
        assert difference(found.double(), expected) < 1e-5


@each_scheme
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@torch.no_grad()
def test_autocast_rounds_no_position(model_type: str, scheme: str) -> None:
    """Positions beyond 256 are no bfloat16 numbers; under autocast llama's queries and keys come in float32, and kernels round them."""
    model, call = Pair(model_type, scheme).model(), padded(700)
    visible = call["attention_mask"].bool()
    for given in (call, {"input_ids": call["input_ids"]}):
        exact = model(**given).logits[visible]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**given).logits[visible].float()
        plain = hfpos.patch(unpatched(model_type), "nope")
        expected = plain(**given).logits[visible]
        with torch.autocast("cpu", torch.bfloat16):
            usual = plain(**given).logits[visible].float() - expected
        error = (rounded - exact).abs().mean() / exact.abs().mean()
        assert error < 1.6 * usual.abs().mean() / expected.abs().mean()


def test_autocast_trains() -> None:
    for scheme in SCHEMES:
        model = Pair("llama", scheme).model().train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**padded(), labels=padded()["input_ids"], use_cache=False).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# The user's choice


CHOICES = {
    "sdpa": "hfpos_sdpa",
    "eager": "hfpos_eager",
}


@each_scheme
@each_model
@torch.no_grad()
def test_a_choice_before_or_after_or_in_the_patch_is_the_same(model_type: str, scheme: str) -> None:
    expected = Pair(model_type, scheme).model()(**padded()).logits
    visible = padded()["attention_mask"].bool()
    for choice, name in CHOICES.items():
        after = use_backend(Pair(model_type, scheme).model(), choice)
        inside = hfpos.patch(unpatched(model_type), scheme, backend=choice)
        inside.load_state_dict(after.state_dict())
        for model in (after, inside):
            assert difference(model(**padded()).logits[visible], expected[visible]) < 5e-5
            assert model.config._attn_implementation == name
            assert hfpos.unpatch(model).config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    "choice", ["flex_attention", "flash_attention_2", "flash_attention_3", "paged|eager", "kernels-community/x"]
)
def test_no_choice_drops_the_bias_in_silence(choice: str) -> None:
    """It is refused by Transformers or by us; what a scheme can stand on is tried elsewhere."""
    model = Pair("llama", "fire").model()
    with pytest.raises((hfpos.PatchError, ImportError, ValueError)):  # noqa: PT012
        model.set_attn_implementation(choice)
        model(tokens(1, 9))
    model = Pair("llama", "fire").model()
    model.config._attn_implementation = choice
    with pytest.raises(
        hfpos.PatchError, match=f"implementation {choice.replace('|', '.')!r} cannot carry this scheme.*set_attn_imp"
    ):
        model(tokens(1, 9))
    with pytest.raises(hfpos.PatchError, match="cannot carry this scheme"):
        hfpos.patch(unpatched("llama"), "fire", backend=choice)


def test_describe_says_how_and_why() -> None:
    def path(scheme: str, backend: str = "auto", model_type: str = "llama") -> str:
        return hfpos.describe(hfpos.patch(unpatched(model_type), scheme, backend=backend, prove=False)).path

    for model_type in MODELS:
        assert "blocks" in path("kerple", model_type=model_type)
        assert path("alibi", model_type=model_type) != path("kerple", model_type=model_type)
    assert "extra dimensions" in path("alibi")
    assert "distance" in path("fire")
    assert "written out" in path("fire")
    assert "flex_attention" in path("kerple", "flex")
    assert all("eager" in path(scheme, "eager") for scheme in SCHEMES)
    assert path("nope") == ""
    described = str(hfpos.describe(hfpos.patch(unpatched("llama"), "kerple")))
    assert path("kerple")[:20] in described
    model = Pair("llama", "kerple").model()
    before = hfpos.describe(model).path
    use_backend(model, "eager")
    assert hfpos.describe(model).path != before


# The cache


@each_scheme
@each_model
@torch.no_grad()
def test_the_cache_is_laid_out_as_it_always_is(model_type: str, scheme: str) -> None:
    """The keys of the first layer do not know of the bias, and everything has the stock shape."""
    models = Pair(model_type, scheme).model(), Pair(model_type, "nope").model()
    for make in (DynamicCache, lambda: StaticCache(models[0].config, max_cache_len=LENGTH + 5)):
        found, expected = (
            model(tokens(2, LENGTH), past_key_values=make(), use_cache=True).past_key_values for model in models
        )
        assert type(found) is type(expected)
        for a, b in zip(found.layers, expected.layers, strict=True):
            assert a.keys.shape == b.keys.shape
            assert a.values.shape == b.values.shape
            assert a.keys.dtype == b.keys.dtype
        assert torch.equal(found.layers[0].keys, expected.layers[0].keys)
        assert torch.equal(found.layers[0].values, expected.layers[0].values)


@pytest.mark.parametrize("kind", ["default", "plain", "static"])
@each_scheme
@torch.no_grad()
def test_prefill_steps_and_chunks_agree_where_layers_have_windows(scheme: str, kind: str) -> None:
    """A plain cache keeps also what has left the window, so that no step may see it."""
    model = Pair("mistral", scheme).model()
    make = {
        "default": lambda: None,
        "plain": DynamicCache,
        "static": lambda: StaticCache(model.config, max_cache_len=LENGTH),
    }[kind]
    expected = model(**padded(), use_cache=False).logits
    visible = padded()["attention_mask"].bool()
    for steps in ([LENGTH], [19, *[1] * 21], [15, 2, 23]):
        cache, logits, start = make(), [], 0
        for step in steps:
            now: dict[str, Any] = {key: x[:, start : start + step] for key, x in padded().items()}
            now["attention_mask"] = padded()["attention_mask"][:, : start + step]
            output = model(**now, past_key_values=cache, use_cache=True)
            cache, start = output.past_key_values, start + step
            logits.append(output.logits)
        assert difference(torch.cat(logits, dim=1)[visible], expected[visible]) < 5e-5


@pytest.mark.parametrize("scheme", ["kerple", "shaw"])  # alibi has its turn in tests/test_compile.py
@torch.no_grad()
def test_decoding_compiles_a_few_times_only(scheme: str) -> None:
    torch._dynamo.reset()
    check_decoding(model_of(Pair("llama", scheme)))


@each_scheme
def test_generation_is_silent_and_the_same_with_any_cache(scheme: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model, call = Pair("llama", scheme).model(), padded()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**call, **options, use_cache=False)
    assert torch.equal(model.generate(**call, **options), expected)
    assert not [record for record in caplog.records if "hfpos" in record.getMessage()]
