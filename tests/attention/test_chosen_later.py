"""An attention implementation chosen after patching, in whichever of a model's configs: the scheme stays, or the call fails."""

import pytest
import torch
import transformers
from transformers import LogitsProcessor

import hfpos
from hfpos.bench.shrink import tiny_model
from tests.pairs import Pair, difference, tokens


CLASSES = (transformers.LlamaForCausalLM, transformers.Gemma3ForConditionalGeneration)
WAYS = {
    "model": lambda model, name: model.set_attn_implementation(name),
    "decoder": lambda model, name: model.base_model.get_decoder().set_attn_implementation(name),
    "config": lambda model, name: setattr(model.config, "_attn_implementation", name),
    "text config": lambda model, name: setattr(model.config.get_text_config(), "_attn_implementation", name),
    "layer": lambda model, name: setattr(layer(model).self_attn.config, "_attn_implementation", name),
}
UNABLE = ("flash_attention_3", "paged|sdpa", "kernels-community/flash-attn2")


def layer(model):
    return model.base_model.get_decoder().layers[-1]


def patched(kind):
    return hfpos.patch(tiny_model(kind, 0), "alibi")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_the_scheme_survives(kind, way):
    ids = tokens(1, 40)
    expected = patched(kind)(input_ids=ids).logits
    for name in ("sdpa", "eager"):
        model = patched(kind)
        WAYS[way](model, name)
        assert difference(model(input_ids=ids).logits, expected) < 1e-5


@pytest.mark.parametrize("name", UNABLE)
@pytest.mark.parametrize(
    "way", [way for way in WAYS if way not in ("model", "decoder")]
)  # which ask for the package first
@pytest.mark.parametrize("kind", CLASSES)
def test_what_cannot_carry_it_fails(kind, way, name):
    model = patched(kind)
    WAYS[way](model, name)
    with pytest.raises(hfpos.PatchError, match="cannot carry this scheme"):
        model(input_ids=tokens(1, 8))


class Choose(LogitsProcessor):
    """Chooses another implementation in the middle of `generate`."""

    def __init__(self, model, name):
        self.model, self.name, self.steps = model, name, 0

    def __call__(self, input_ids, scores):
        self.steps += 1
        if self.steps == 3:
            self.model.set_attn_implementation(self.name)
        return scores


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_the_scheme_survives_within_generate(name):
    ids, pair = tokens(1, 12), Pair("llama", "alibi")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model = pair.model()
    found = model.generate(ids, logits_processor=[Choose(model, name)], **options)
    assert model.config._attn_implementation == f"hfpos_{name}"
    assert torch.equal(found, pair.model().generate(ids, **options))
