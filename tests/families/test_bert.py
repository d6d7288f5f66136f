"""BERT and its kin: every scheme in both directions, as formulas have it; padding, packing, length, decoders."""

from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import gelu, layer_norm, linear
from torch.testing import assert_close

import hfpos
from hfpos.bench.shrink import tiny_model
from tests.families.formulas import attention_logits, learned_weights, of_layer, padded, sinusoids


SCHEMES: dict[str, dict[str, Any]] = {
    "rope": {},
    "alibi": {},
    "kerple": {},
    "sandwich": {},
    "t5": {},
    "shaw": {},
    "sinusoidal": {},
    "nope": {},
}
KIN = ("Roberta", "Electra", "Albert", "DistilBert", "XLMRoberta")


def bert(kind: str = "BertForMaskedLM", **overrides: Any) -> Any:
    sizes: dict[str, Any] = {"is_decoder": False, "num_hidden_layers": 2}
    if kind.startswith("DistilBert"):
        sizes |= {"dim": 64, "hidden_dim": 96, "initializer_range": 0.15}
    return tiny_model(getattr(transformers, kind), **sizes | overrides)


def ids(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 100, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference(model: Any, tokens: torch.Tensor, scheme: str | None) -> torch.Tensor:
    """The logits (B, L, V) of a BertForMaskedLM in float64, from its parameters and a formula for its positions."""
    w = dict(model.named_parameters())
    base, config, eps = model.bert, model.config, model.config.layer_norm_eps

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["bert.embeddings.word_embeddings.weight"][tokens] + w["bert.embeddings.token_type_embeddings.weight"][0]
    if scheme == "sinusoidal":
        x = x + sinusoids(tokens.shape[1], x.shape[-1])
    x = norm(x, "bert.embeddings.LayerNorm")
    for i in range(config.num_hidden_layers):
        at = f"bert.encoder.layer.{i}"
        q, k, v = (
            project(x, f"{at}.attention.self.{name}").unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        logits = attention_logits(scheme, q, k, q.shape[-1] ** -0.5, True, of_layer(base, i))
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = norm(x + project(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        inner = gelu(project(x, f"{at}.intermediate.dense"))
        x = norm(x + project(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    head = "cls.predictions"
    x = norm(gelu(project(x, f"{head}.transform.dense")), f"{head}.transform.LayerNorm")
    return linear(x, w["bert.embeddings.word_embeddings.weight"], w[f"{head}.bias"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_and_gradients_are_the_formulas(scheme: str) -> None:
    model = hfpos.patch(bert(), scheme).double()
    learned_weights(model)
    tokens = ids(97)  # beyond the 64 positions of its table
    found, expected = model(tokens).logits, reference(model, tokens, scheme)
    close = 1e-4 if scheme == "sinusoidal" else 1e-9  # whose table is float32, also for wider models
    assert_close(found, expected, rtol=0, atol=close)
    aim = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    pairs = zip(
        torch.autograd.grad((found * aim).sum(), trained, allow_unused=True),
        torch.autograd.grad((expected * aim).sum(), trained, allow_unused=True),
        strict=True,
    )
    for one, other in pairs:
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, rtol=close, atol=close)


@pytest.mark.parametrize("scheme", [*SCHEMES, "learned"])
def test_padding_length_and_backend_change_nothing(scheme: str) -> None:
    model = hfpos.patch(bert(), scheme, **({"target_length": 160} if scheme == "learned" else {}))
    learned_weights(model)
    tokens = ids(71)
    plain = model(tokens).logits
    assert_close(model(inputs_embeds=model.get_input_embeddings()(tokens)).logits, plain, rtol=0, atol=0)
    for left, right in ((0, 13), (6, 0)):
        wide, mask = padded(tokens, left, right)
        for inputs in ({"attention_mask": mask}, {"attention_mask": mask, "token_type_ids": torch.zeros_like(wide)}):
            assert_close(model(wide, **inputs).logits[:, left : left + 71], plain, rtol=0, atol=2e-5)
    model.set_attn_implementation("eager")
    assert_close(model(tokens).logits, plain, rtol=0, atol=2e-5)
    assert_close(model(wide, attention_mask=mask).logits[:, 6:], plain, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scheme", ["rope", "alibi", "t5", "sinusoidal", "nope"])
def test_documents_packed_into_a_row_do_not_see_each_other(scheme: str) -> None:
    model = hfpos.patch(bert(), scheme)
    learned_weights(model)
    one, two = ids(20), ids(13, seed=1)
    places = torch.cat((torch.arange(20), torch.arange(13)))[None]
    together = model(torch.cat((one, two), 1), position_ids=places).logits
    assert_close(together, torch.cat((model(one).logits, model(two).logits), 1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KIN)
def test_kin_of_bert(kind: str) -> None:
    """Padding and a late beginning change nothing, where the position ids of RoBERTa begin behind its padding's too."""
    model = bert(f"{kind}ForMaskedLM")
    tokens = ids(31)
    wide, mask = padded(tokens, 5, 4)
    before = model(wide, attention_mask=mask).logits
    for scheme in ("rope", "alibi", "t5", "sinusoidal"):
        hfpos.patch(model, scheme)
        learned_weights(model)
        plain = model(tokens).logits
        assert_close(model(wide, attention_mask=mask).logits[:, 5:36], plain, rtol=0, atol=2e-5)
        first = 1 if "oberta" in kind.lower() else 0  # padding_idx + 1
        places = torch.arange(31)[None] + first
        assert_close(model(tokens, position_ids=places).logits, plain, rtol=0, atol=2e-5)
        assert model(ids(130)).logits.isfinite().all()  # twice its table
    hfpos.unpatch(model)
    assert torch.equal(model(wide, attention_mask=mask).logits, before)


def test_roberta_sees_padding_in_the_ids() -> None:
    """Without a mask padding is attended to, as in the stock model, but it takes no place."""
    model = hfpos.patch(bert("RobertaModel", num_hidden_layers=1), "sinusoidal")
    tokens = ids(9)
    wide, _ = padded(tokens, 3, 0)
    inside: list[torch.Tensor] = []
    model.embeddings.register_forward_hook(lambda module, args, output: inside.append(output))
    model(wide)
    model(tokens)
    assert_close(inside[0][:, 3:], inside[1])


def test_a_table_is_resized_and_saved_as_a_stock_model(tmp_path: Any) -> None:
    for kind in ("BertForMaskedLM", "RobertaForMaskedLM"):
        model = bert(kind)
        table = model.base_model.embeddings.position_embeddings
        first = 0 if table.padding_idx is None else table.padding_idx + 1
        tokens, stock = ids(60), model(ids(60)).logits
        hfpos.patch(model, "learned", target_length=150)
        assert model.base_model.embeddings.position_embeddings.weight.shape[0] == 150 + first
        assert model.config.max_position_embeddings == 150 + first
        assert_close(model(tokens).logits, stock, rtol=0, atol=2e-6)
        longer = model(ids(150)).logits
        model.save_pretrained(tmp_path / kind)
        again = getattr(transformers, kind).from_pretrained(tmp_path / kind)
        assert_close(again(ids(150)).logits, longer, rtol=0, atol=2e-6)
        hfpos.unpatch(model)
        assert model.base_model.embeddings.position_embeddings is table
        assert model.base_model.embeddings.position_ids.shape[-1] == 64
        assert torch.equal(model(tokens).logits, stock)


@pytest.mark.parametrize("scheme", ["rope", "alibi", "fire", "dynamic", "sinusoidal"])
@pytest.mark.parametrize("kind", ["BertLMHeadModel", "RobertaForCausalLM"])
def test_as_a_decoder_it_is_causal_and_decodes_as_it_prefills(kind: str, scheme: str) -> None:
    model = hfpos.patch(bert(kind, is_decoder=True), scheme)
    tokens, mask = padded(ids(14, rows=2), 4, 0)
    mask[1, :4] = 1
    full = model(tokens, attention_mask=mask).logits
    step = model(tokens[:, :9], attention_mask=mask[:, :9], use_cache=True)
    parts = [step.logits]
    for i in range(9, 18):
        seen = {"attention_mask": mask[:, : i + 1], "past_key_values": step.past_key_values}
        step = model(tokens[:, i : i + 1], use_cache=True, **seen)
        parts.append(step.logits)
    assert_close(torch.cat(parts, 1)[mask > 0], full[mask > 0], rtol=0, atol=2e-5)
    assert_close(full[:1, 4:], model(tokens[:1, 4:]).logits, rtol=0, atol=2e-5)
    changed = tokens.clone()
    changed[:, -1] = 7
    earlier = mask.bool() & (torch.arange(18) < 17)
    assert_close(model(changed, attention_mask=mask).logits[earlier], full[earlier], rtol=0, atol=1e-6)


def test_attention_to_another_text_is_left_alone() -> None:
    model = bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    attend = model.bert.encoder.layer[0].crossattention.self
    states, other = torch.randn(1, 7, 64), torch.randn(1, 9, 64)
    before = attend(states, encoder_hidden_states=other)[0]
    seen: list[torch.Tensor] = []
    hfpos.patch(model, "alibi")
    attend.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    model(ids(7), encoder_hidden_states=other)  # the Call reaches it
    assert len(seen) == 1
    assert torch.equal(attend(states, encoder_hidden_states=other)[0], before)
    with pytest.raises(AttributeError):
        hfpos.unpatch(model).bert.encoder.layer[0].crossattention.self.is_cross_attention  # noqa: B018


@pytest.mark.parametrize(
    "head", ["SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"]
)
def test_heads(head: str, tmp_path: Any) -> None:
    model = hfpos.patch(bert(f"BertFor{head}"), "alibi")
    assert hfpos.describe(model).proved
    inputs = ids(9)[None] if head == "MultipleChoice" else ids(9)
    model.save_pretrained(tmp_path)
    again = hfpos.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert_close(again(inputs)[0], model(inputs)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["rope", "alibi", "t5", "sinusoidal"])
def test_saved_is_loaded_and_taken_out_again(scheme: str, tmp_path: Any) -> None:
    model = bert()
    stock, config = model(ids(40)).logits, model.config.to_dict()
    hfpos.patch(model, scheme)
    learned_weights(model)
    after = model(ids(80)).logits
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match="hfpos"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert_close(hfpos.from_pretrained(tmp_path)(ids(80)).logits, after, rtol=0, atol=1e-5)
    hfpos.unpatch(model)
    assert torch.equal(model(ids(40)).logits, stock)
    assert model.config.to_dict() == config
    assert all(weight.requires_grad for weight in model.parameters())


def test_in_bfloat16_positions_stay_exact() -> None:
    for scheme in ("rope", "alibi", "sinusoidal"):
        model = hfpos.patch(bert(), scheme)
        exact = model(ids(600)).logits
        found = model.bfloat16()(ids(600)).logits.float()
        assert (found - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_what_makes_no_sense_in_both_directions_says_what_does() -> None:
    model = bert()
    before = model(ids(20)).logits
    for scheme, given in (("dynamic", {}), ("self_extend", {"group_size": 4})):
        with pytest.raises(hfpos.PatchError, match=r"behind.*what works there: alibi, .*kerple.*rope.*nope"):
            hfpos.patch(model, scheme, **given)
    with pytest.raises(hfpos.PatchError, match="encoder_decoder.*offers only"):
        hfpos.patch(model, "encoder_decoder", encoder="alibi")
    assert torch.equal(model(ids(20)).logits, before)
    assert "bidirectional=True" in str(hfpos.describe(hfpos.patch(model, "alibi")))


def test_an_encoder_that_rotates_gets_two_sided_biases_too() -> None:
    config = transformers.NomicBertConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=96, vocab_size=128
    )
    torch.manual_seed(0)
    model = hfpos.patch(transformers.NomicBertModel(config).eval(), "alibi")
    wide, mask = padded(ids(20), 3, 4)
    assert_close(model(wide, attention_mask=mask)[0][:, 3:23], model(ids(20))[0], rtol=0, atol=2e-5)
    with pytest.raises(hfpos.PatchError, match="behind"):
        hfpos.patch(model, "dynamic")
