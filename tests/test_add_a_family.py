"""A new family is one file: here it lies outside of the package, and is entered by whoever imports it."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hfpos
from hfpos.schemes import Sinusoidal
from tests.state import State
from tests.tiny import tiny


SOURCE = '''
"""GPT-1: a learned table of positions, and attention of its own, which nothing gets into."""

from transformers.models.openai.modeling_openai import OpenAIGPTModel

from hfpos import PatchError
from hfpos.families import REGISTRY
from hfpos.families._family import Family
from hfpos.families._tables import switched_off
from hfpos.families._without_rotary import geometry_without_rotary
from hfpos.schemes import Learned


class OpenAIGPT(Family):
    """GPT-1 and its heads."""

    name = "openai_gpt"
    priority = 9
    seams = ("embed", "none")
    trained_kind = Learned

    @classmethod
    def refuses(cls, model):
        return None if isinstance(model.base_model, OpenAIGPTModel) else "it is not a GPT-1"

    def native(self):
        return "learned"

    def geometry(self):
        return geometry_without_rotary(self.config.n_head, self.config.n_embd, self.config.n_positions)

    def length_keys(self):
        return ("n_positions",)

    def probe_positions(self, geometry):
        return None

    def positions_off(self, config):
        return switched_off(self.decoder.positions_embed)

    def rotary_edits(self, scheme, geometry, config, whole):
        raise PatchError(f"{scheme.name!r} rotates queries and keys, for which openai_gpt has no seam")


REGISTRY.add(OpenAIGPT.name, OpenAIGPT)
'''
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids=IDS, **given):
    return model(ids, **given).logits


@pytest.fixture
def _added(tmp_path):
    assert len(SOURCE.splitlines()) < 100
    path = tmp_path / "openai_gpt.py"
    path.write_text(SOURCE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("somewhere.openai_gpt", path)
    before = hfpos.families()
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert hfpos.families().keys() - before.keys() == {"openai_gpt"}
    yield
    hfpos.families.REGISTRY.remove("openai_gpt")
    assert hfpos.families() == before


def with_sinusoids(model, ids):
    """What a GPT-1 gives whose table holds sinusoids."""
    with torch.no_grad():
        table = model.transformer.positions_embed.weight
        table.copy_(Sinusoidal().table(torch.arange(len(table)), table.shape[1]))
    return logits(model, ids)


@pytest.mark.usefixtures("_added")
def test_a_file_is_all_that_a_family_needs(tmp_path):
    model = tiny("openai-gpt")
    before = State(model)
    assert hfpos.describe(model).family == "openai_gpt"
    hfpos.patch(model, "sinusoidal")
    assert hfpos.describe(model).proved
    torch.testing.assert_close(logits(model), with_sinusoids(tiny("openai-gpt"), IDS))
    padded = torch.cat((torch.zeros_like(IDS[:, :5]), IDS), dim=1)
    mask = (torch.arange(25) >= 5).long().repeat(2, 1)
    torch.testing.assert_close(logits(model, padded, attention_mask=mask)[:, 5:], logits(model), rtol=1e-4, atol=1e-5)
    model(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    model.zero_grad()

    model.save_pretrained(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))["hfpos"]["scheme"] == "sinusoidal"
    )
    assert torch.equal(logits(hfpos.from_pretrained(tmp_path / "saved")), logits(model))
    with pytest.raises(Exception, match="hfpos"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    hfpos.unpatch(model)
    assert State(model) == before
    nope = logits(hfpos.patch(model, "nope"))
    assert not torch.equal(nope, logits(tiny("openai-gpt")))


@pytest.mark.usefixtures("_added")
@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("alibi", r"'alibi' acts at the 'bias' seam; openai_gpt \(OpenAIGPTLMHeadModel\) offers only: embed, none"),
        ("rope", r"'rope' acts at the 'freq' seam; openai_gpt"),
    ],
)
def test_what_it_does_not_offer_is_refused(scheme, message):
    model = tiny("openai-gpt")
    with pytest.raises(hfpos.PatchError, match=message):
        hfpos.patch(model, scheme)
    assert torch.equal(logits(model), logits(tiny("openai-gpt")))


def test_it_is_gone_afterwards():
    assert "openai_gpt" not in hfpos.families()


def test_a_second_family_of_the_same_name_is_refused():
    class Impostor(hfpos.families()["gpt2"]):
        name = "rotary"

    before = hfpos.families()
    with pytest.raises(hfpos.PatchError, match="family 'rotary' is defined twice"):
        hfpos.families.REGISTRY.add(Impostor.name, Impostor)
    assert hfpos.families() == before
