"""A new table of positions in models that have none: what it adds, that it learns, and that it survives all that befalls a model."""

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

import hfpos
from hfpos.attention.learned import TABLE
from tests.pairs import difference, tokens, unpatched
from tests.state import State, logits


# PEFT 0.21 asks Transformers 5.23 for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LENGTH = 40
MODELS = ["llama", "gemma3_text", "bloom", "falcon", "mpt"]
each_model = pytest.mark.parametrize("model_type", MODELS)


def table_of(model: torch.nn.Module) -> torch.nn.Parameter:
    (found,) = (weight for name, weight in model.named_parameters() if f"{TABLE}." in name)
    return found


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """The model with a table of numbers, as after a training."""
    with torch.no_grad():
        table = table_of(model)
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    return model


def patched(model_type: str) -> torch.nn.Module:
    return filled(hfpos.patch(unpatched(model_type), "learned", target_length=LENGTH))


@each_model
def test_its_rows_are_added_to_the_embeddings_of_a_model_without_positions(model_type: str) -> None:
    model, plain = patched(model_type), hfpos.patch(unpatched(model_type), "nope")
    ids, positions = tokens(2, 9), torch.tensor([[0, 1, 2, 7, 8, 20, 21, 22, 39]]).expand(2, -1)
    embeds = plain.get_input_embeddings()(ids)
    for given in (torch.arange(9)[None], positions):
        options = {} if given is not positions else {"position_ids": positions, "attention_mask": torch.ones_like(ids)}
        expected = plain(inputs_embeds=embeds + table_of(model)[given], attention_mask=torch.ones_like(ids)).logits
        assert difference(model(ids, **options).logits, expected) < 1e-5
        assert difference(model(inputs_embeds=embeds, **options).logits, expected) < 1e-5


@each_model
def test_starts_without_positions_and_learns(model_type: str) -> None:
    model = hfpos.patch(unpatched(model_type), "learned", target_length=LENGTH)
    assert torch.equal(logits(model, LENGTH), logits(hfpos.patch(unpatched(model_type), "nope"), LENGTH))
    table = table_of(model)
    assert (tuple(table.shape), table.requires_grad) == ((LENGTH, 64), True)
    ids = tokens(2, 20)
    optimizer = torch.optim.Adam([weight for weight in model.train().parameters() if weight.requires_grad], lr=0.01)
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert table.grad[:19].abs().sum(-1).gt(0).all()  # nothing is predicted from the last token
    assert not table.grad[19:].any()
    optimizer.step()
    assert table[:19].abs().sum(-1).gt(0).all()


def test_decoding_padding_packing_and_beams() -> None:
    model, ids = patched("llama"), tokens(2, 17)
    whole = model(ids).logits
    half = model(ids[:, :9], use_cache=True)
    assert difference(model(ids[:, 9:], past_key_values=half.past_key_values).logits, whole[:, 9:]) < 1e-5
    padded, mask = torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    assert difference(model(padded, attention_mask=mask).logits[:, 4:], whole) < 1e-5
    packed = model(ids.view(1, -1), position_ids=torch.arange(17).repeat(2)[None]).logits.view(2, 17, -1)
    assert difference(packed, whole) < 1e-5
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for more in ({}, {"num_beams": 3}):
        found = [model.generate(ids, cache_implementation=kind, **options, **more) for kind in ("dynamic", "static")]
        assert torch.equal(*found)
    narrow = copy.deepcopy(model).bfloat16()
    assert table_of(narrow).dtype == torch.bfloat16
    assert difference(narrow(ids).logits.float(), whole) < 0.05 * whole.abs().max()


def test_beyond_its_end_it_says_so() -> None:
    model = patched("llama")
    with pytest.raises(
        hfpos.PatchError, match=r"^learned: position 40 is outside of the table of 40 positions, 0 \.\. 39; "
    ) as error:
        model(tokens(1, LENGTH + 1))
    assert "\n" not in str(error.value)
    with pytest.raises(hfpos.PatchError, match="position 40 is outside"):
        model.generate(tokens(1, LENGTH), max_new_tokens=2, pad_token_id=0, eos_token_id=None)


def test_describe_and_undo() -> None:
    model = unpatched("llama")
    before, expected = State(model), logits(model)
    found = hfpos.describe(hfpos.patch(model, "learned"))
    assert (found.scheme, found.trained_length, found.patched_length, found.table_length) == ("learned", 32, 32, 32)
    assert (found.proved, found.stock_loadable, found.needs_training) == (True, False, True)
    hfpos.patch(model, "learned", target_length=50)
    assert model.config.max_position_embeddings == len(table_of(model)) == 50
    assert State(hfpos.unpatch(model)).differences(before) == []
    assert torch.equal(logits(model), expected)
    with pytest.raises(
        hfpos.PatchError, match="learned: it was made for dim=8, the embeddings of the model are 64 wide"
    ):
        hfpos.patch(model, hfpos.schemes.Learned(8, target_length=50))
    assert State(model).differences(before) == []


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
def test_copies_and_checkpoints_hold_it(model_type: str, tmp_path) -> None:
    model = patched(model_type)
    expected = logits(model, LENGTH)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        table_of(other).data.mul_(2)
        assert difference(logits(other, LENGTH), expected) > 1e-3
    assert torch.equal(logits(model, LENGTH), expected)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = hfpos.from_pretrained(tmp_path)
    assert torch.equal(table_of(again), table_of(model))
    assert difference(logits(again, LENGTH), expected) < 1e-5
    with pytest.raises(Exception, match=r"hfpos"):
        AutoModel.from_pretrained(tmp_path)


def test_adapters_hold_it_or_are_refused(tmp_path) -> None:
    unpatched("llama").save_pretrained(tmp_path / "base")
    config = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
    base = hfpos.patch(hfpos.from_pretrained(tmp_path / "base"), "learned", target_length=LENGTH)
    model = get_peft_model(base, LoraConfig(**config, modules_to_save=[TABLE])).train()
    (table,) = (w for n, w in model.named_parameters() if TABLE in n and w.requires_grad)
    model(tokens(2, LENGTH), labels=tokens(2, LENGTH)).loss.backward()
    torch.optim.SGD([table], lr=10.0).step()
    expected = logits(model.eval(), LENGTH)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["hfpos"]["scheme"] == "learned"
    assert difference(logits(hfpos.from_pretrained(tmp_path / "adapter").eval(), LENGTH), expected) < 1e-5
    after = hfpos.patch(get_peft_model(hfpos.from_pretrained(tmp_path / "base"), LoraConfig(**config)), "learned")
    with pytest.raises(hfpos.PatchError, match=r"would not hold them; .*modules_to_save=\['hfpos_table'\]"):
        after.save_pretrained(tmp_path / "lost")


def test_compiled_and_checkpointed_are_equal() -> None:
    ids = tokens(2, 12)

    def gradients(model: torch.nn.Module, call) -> list[torch.Tensor]:
        call(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None]

    model = patched("llama").train()
    expected = gradients(model, model)
    model = patched("llama").train()
    for found, one in zip(
        gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True)), expected, strict=True
    ):
        assert difference(found, one) < 1e-5
    model = patched("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for found, one in zip(gradients(model, model), expected, strict=True):
        assert difference(found, one) < 1e-5
