"""Encoder-decoders with a table of positions in each stack: schemes in both, caches, padding, resized tables, saving."""

from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

import hfpos
from tests.families.formulas import learned_weights, padded


def bart(kind: str = "BartForConditionalGeneration", **overrides: Any) -> Any:
    model_class = getattr(transformers, kind)
    stack = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in stack.items()}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    shape = {"d_model": 64, "vocab_size": 128, "max_position_embeddings": 64, "init_std": 0.15}
    torch.manual_seed(0)
    return model_class(model_class.config_class(**sizes | tokens | shape | overrides)).eval()


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 100, (1, length), generator=torch.Generator().manual_seed(seed))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("rope", {}),
    ("alibi", {}),
    ("t5", {}),
    ("shaw", {}),
    ("sinusoidal", {}),
    ("nope", {}),
    ("learned", {"target_length": 160}),
    ("encoder_decoder", {"encoder": "rope", "decoder": "alibi"}),
]


@pytest.mark.parametrize(("scheme", "given"), CASES)
def test_padding_caches_length_and_saving(scheme: str, given: dict[str, Any], tmp_path: Any) -> None:
    model = bart()
    source, target = ids(90), ids(71, seed=1)  # beyond the 64 rows of the tables
    short = {"input_ids": source[:, :40], "decoder_input_ids": target[:, :9]}
    stock = model(**short).logits
    hfpos.patch(model, scheme, **given)
    learned_weights(model)
    plain = model(input_ids=source, decoder_input_ids=target).logits
    wide, mask = padded(source, 5, 3)
    late, seen = padded(target, 4, 0)
    found = model(input_ids=wide, attention_mask=mask, decoder_input_ids=late, decoder_attention_mask=seen).logits
    assert_close(found[:, 4:], plain, rtol=0, atol=2e-5)
    step: Any = model(input_ids=source, decoder_input_ids=target[:, :66], use_cache=True)
    parts, states = [step.logits], (step.encoder_last_hidden_state,)
    for i in range(66, 71):
        rest = {"encoder_outputs": states, "past_key_values": step.past_key_values, "use_cache": True}
        step = model(decoder_input_ids=target[:, i : i + 1], **rest)
        parts.append(step.logits)
    assert_close(torch.cat(parts, 1), plain, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path)
    again = hfpos.from_pretrained(tmp_path).eval()
    assert_close(again(input_ids=source, decoder_input_ids=target).logits, plain, rtol=0, atol=1e-5)
    hfpos.unpatch(model)
    assert torch.equal(model(**short).logits, stock)


def test_the_encoder_looks_both_ways_and_the_decoder_back() -> None:
    model = hfpos.patch(bart(), "alibi")
    source, target = ids(20), ids(12, seed=1)
    states = model.get_encoder()(source)[0]
    logits = model(input_ids=source, decoder_input_ids=target).logits
    source[0, -1], target[0, -1] = 7, 7
    assert (model.get_encoder()(source)[0][:, 0] - states[:, 0]).abs().max() > 1e-4
    source[0, -1] = ids(20)[0, -1]
    assert_close(model(input_ids=source, decoder_input_ids=target).logits[:, :-1], logits[:, :-1])


def test_resized_together_it_is_a_stock_model_again(tmp_path: Any) -> None:
    model = bart()
    short = {"input_ids": ids(60), "decoder_input_ids": ids(50, seed=1)}
    stock = model(**short).logits
    hfpos.patch(model, "learned", target_length=100)
    assert_close(model(**short).logits, stock)
    long = {"input_ids": ids(100), "decoder_input_ids": ids(100, seed=1)}
    model.save_pretrained(tmp_path)
    again = transformers.BartForConditionalGeneration.from_pretrained(tmp_path)
    assert_close(again(**long).logits, model(**long).logits, rtol=0, atol=1e-5)
    with pytest.raises(hfpos.PatchError, match="resize them together"):
        hfpos.patch(model, "encoder_decoder", decoder="learned(target_length=100)")


def test_kin_with_sinusoids_and_scaled_embeddings() -> None:
    """Marian multiplies its embeddings only where it looks tokens up itself, so that a table is refused and the rest works."""
    model = bart("MarianMTModel", scale_embedding=True)
    assert hfpos.describe(model).scheme == "sinusoidal"
    inputs = {"input_ids": ids(30), "decoder_input_ids": ids(12, seed=1)}
    nowhere = hfpos.patch(model, "nope")(**inputs).logits
    scaled = model.get_input_embeddings()(ids(30)) * 8
    assert_close(model(inputs_embeds=scaled, decoder_input_ids=inputs["decoder_input_ids"]).logits, nowhere)
    for scheme in ("sinusoidal", "learned"):
        with pytest.raises(hfpos.PatchError, match=r"embed_scale=8.*rope or alibi"):
            hfpos.patch(model, scheme)
