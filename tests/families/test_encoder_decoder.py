"""A scheme of its own in each stack of an encoder-decoder, in one call."""

from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

import hfpos
from hfpos.schemes.encoder_decoder import EncoderDecoder
from tests.families.formulas import learned_weights
from tests.families.test_t5 import assert_is_reference, ids, t5
from tests.tiny import tiny


PAIRS: list[tuple[Any, Any]] = [("rope", "alibi"), ("alibi", None), (None, "shaw"), ("t5", "kerple")]


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_each_stack_has_its_own(encoder: Any, decoder: Any) -> None:
    model = hfpos.patch(t5(), "encoder_decoder", encoder=encoder, decoder=decoder)
    learned_weights(model)
    assert_is_reference(model, encoder or "t5", decoder or "t5", 1e-9)


@pytest.mark.parametrize(
    ("encoder", "decoder"), [("rope", "alibi(factor=2)"), ("shaw", "fire"), ("kerple", "kerple"), (None, "sinusoidal")]
)
def test_saved_is_loaded_and_taken_out_again(encoder: Any, decoder: Any, tmp_path: Any) -> None:
    model = t5()
    inputs = {"input_ids": ids(33), "decoder_input_ids": ids(17)}
    stock, config, names = model(**inputs).logits, model.config.to_dict(), list(model.state_dict())
    hfpos.patch(model, "encoder_decoder", encoder=encoder, decoder=decoder)
    learned_weights(model)
    after = model(**inputs).logits
    assert (after - stock).abs().max() > 0.01
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="hfpos"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    again = hfpos.from_pretrained(tmp_path)
    assert_close(again(**inputs).logits, after, rtol=0, atol=1e-5)
    assert again.hfpos_record.scheme == model.hfpos_record.scheme
    text = str(hfpos.describe(again))
    assert f"encoder: {encoder or 'its own'}" in text
    assert f"decoder: {decoder}" in text
    hfpos.unpatch(model)
    assert torch.equal(model(**inputs).logits, stock)
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == names
    assert all(weight.requires_grad for weight in model.parameters())


def test_it_is_plain_json_and_equal_to_itself() -> None:
    scheme = EncoderDecoder(encoder={"scheme": "alibi", "parameters": {"factor": 2}}, decoder="rope")
    assert EncoderDecoder(**scheme.parameters()) == scheme
    assert scheme.parameters()["encoder"]["parameters"]["factor"] == 2


def test_decoding_with_other_positions_than_the_encoder() -> None:
    model = hfpos.patch(t5(), "encoder_decoder", encoder="alibi", decoder="dynamic(original_length=8)")
    given: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(ids(15), **given), model.generate(ids(15), use_cache=False, **given))


def test_bad_input() -> None:
    with pytest.raises(hfpos.PatchError, match="nothing would change"):
        EncoderDecoder()
    with pytest.raises(hfpos.PatchError, match="pair itself"):
        EncoderDecoder(encoder=EncoderDecoder(decoder="alibi"))
    with pytest.raises(hfpos.PatchError, match="unknown scheme"):
        EncoderDecoder(encoder="alibbi")
    with pytest.raises(hfpos.PatchError, match="only its encoder"):
        hfpos.patch(t5("T5EncoderModel"), "encoder_decoder", encoder="rope", decoder="alibi")
    with pytest.raises(hfpos.PatchError, match=r"encoder: 'fire'.*behind"):
        hfpos.patch(t5(), "encoder_decoder", encoder="fire", decoder="fire")
    with pytest.raises(hfpos.PatchError, match="'stacks' seam"):
        hfpos.patch(tiny("llama"), "encoder_decoder", decoder="alibi")
