"""What shifted sparse attention refuses: sizes, models, schemes, and calls in training, with nothing left over."""

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hfpos
from hfpos.attention.shifted import shift_attention
from hfpos.scheme import PatchError
from tests.attention.test_shifted import shifted
from tests.pairs import tokens
from tests.tiny import tiny


def refusals() -> dict[str, Any]:
    """What is refused in training, and a part of the message."""
    ids, square = tokens(1, 40), torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    return {
        "mask": (lambda model: model(ids, attention_mask=square), "2-D attention_mask"),
        "cache": (lambda model: model.generate(ids, max_new_tokens=2), "model.eval"),
        "weights": (lambda model: model(ids, output_attentions=True), "output_attentions"),
        "backend": (
            lambda model: (model.set_attn_implementation("flex_attention"), model(ids)),
            "set_attn_implementation",
        ),
    }


@pytest.mark.parametrize("kind", refusals())
def test_what_is_refused_in_training(kind: str) -> None:
    model = shifted()
    call, message = refusals()[kind]
    with pytest.raises(PatchError, match=message):
        call(model)
    model.set_attn_implementation("sdpa")
    assert torch.isfinite(model.eval()(tokens(1, 40)).logits).all()  # and nothing is left over


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("bloom", "interface"), ("t5", "causally"), ("gemma2", "softcap"), ("gpt_oss", "s_aux")],
)
def test_models_that_are_refused(model_type: str, message: str) -> None:
    model = (
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
        )
        if model_type == "t5"
        else tiny(model_type)
    )
    implementation = model.config._attn_implementation
    with pytest.raises(PatchError, match=message):
        shift_attention(model, groups=4)
    assert model.config._attn_implementation == implementation
    assert "hfpos_shifted" not in model.__dict__


@pytest.mark.parametrize("scheme", ["alibi", "kerple", "dynamic"])
def test_schemes_inside_attention_are_refused(scheme: str) -> None:
    model = hfpos.patch(tiny("llama"), scheme, **({"factor": 2} if scheme == "dynamic" else {}))
    with pytest.raises(PatchError, match="acts inside attention"):
        shift_attention(model, groups=4)
    model = shifted()
    with pytest.raises(PatchError, match="hfpos_shifted"):
        hfpos.patch(model, "alibi")


@pytest.mark.parametrize(
    "sizes",
    [{}, {"groups": 4, "group_size": 8}, {"group_size": 7}, {"groups": 0}, {"group_size": -2}, {"groups": 2.0}],
)
def test_sizes_that_make_no_sense(sizes: dict[str, Any]) -> None:
    with pytest.raises(PatchError, match="shift_attention"):
        shift_attention(tiny("llama"), **sizes)


def test_shared_sequences_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ulysses:
        """What DeepSpeed leaves in the place of an attention function, as far as it is looked at."""

        process_group = "some"

        def __call__(self, *_: Any) -> None:
            """Trade heads."""

    def with_ulysses(inner: Any) -> Any:
        return lambda *given: inner(*given)

    model = shifted()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", with_ulysses(Ulysses()))
    with pytest.raises(PatchError, match="Ulysses"):
        model(tokens(1, 40))
    with pytest.raises(PatchError, match="Ulysses"):
        shift_attention(tiny("llama"), groups=4)
