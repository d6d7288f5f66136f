"""Parameters that a scheme cannot take, and schemes that a model cannot: one line that names both and says what would work."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import hfpos
from tests.tiny import tiny


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("alibi", {"slopes": "steep"}, "alibi: slopes='steep' is not usable; expected a list of numbers"),
        ("alibi", {"slopes": 0.5}, "alibi: slopes=0.5 is not usable; expected a list of numbers"),
        (
            "alibi",
            {"slopes": [[0.5] * 4]},
            "alibi: slopes=[0.5, 0.5, 0.5, 0.5] is not usable; expected a finite number",
        ),
        ("alibi", {"slopes": [True] * 4}, "alibi: slopes=True is not usable; expected a finite number"),
        ("alibi", {"bidirectional": "split"}, "LlamaForCausalLM is causal; use another form of 'alibi'"),
        ("kerple", {"r1": torch.zeros(4)}, "kerple: r1=0.0 is not usable; expected a finite number > 0"),
        ("t5", {"bidirectional": 3}, "t5: bidirectional=3 is not usable; expected True or False"),
        ("per_layer", {"schemes": ["rope", 3]}, "per_layer: 3 is not a scheme"),
        ("per_layer", {"schemes": ["rope", "yarn(factor=)"]}, "'yarn(factor=)': invalid syntax; expected parameters"),
        (
            "per_layer",
            {"schemes": ["rope"]},
            "None for those that stay as they are (per_layer on LlamaForCausalLM, family rotary)",
        ),
        (
            "nope",
            {"layers": [2]},
            "2 is no layer of this model; expected indices from 0 to 1 (nope on LlamaForCausalLM, family rotary)",
        ),
        (
            "nope",
            {"layers": [True]},
            "entries of True and False, the model has 2 layers (nope on LlamaForCausalLM, family rotary)",
        ),
        ("encoder_decoder", {"encoder": "rope"}, "'encoder_decoder' acts at the 'stacks' seam; rotary"),
    ],
)
def test_one_line_that_names_what_was_asked_for(name, parameters, message):
    model = tiny("llama")
    with pytest.raises(hfpos.PatchError) as caught:
        hfpos.patch(model, name, **parameters)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


def test_heads_that_look_ahead_are_for_the_encoder_only():
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 20, "d_ff": 16}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(hfpos.PatchError, match=r"decoder: .*is causal.*encoder_decoder.*\(alibi on .*family t5\)"):
        hfpos.patch(model, "alibi", bidirectional="split")
    hfpos.patch(model, "encoder_decoder", encoder="alibi(bidirectional='split')", decoder="alibi")
    assert hfpos.describe(model).scheme == "encoder_decoder"
