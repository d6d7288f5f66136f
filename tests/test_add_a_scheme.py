"""A new scheme is one file in the package of schemes, and nothing else; here it lies in a folder of its own."""

import importlib.util
import json
import sys

import pytest
import torch

import hfpos
from hfpos.bench.examples import all_examples
from hfpos.scheme import Scheme
from tests.pairs import OWN_ATTENTION, tokens, unpatched
from tests.schemes.test_golden import check_rotation
from tests.state import logits


SOURCE = '''
"""Frequencies of one's own."""

from dataclasses import dataclass

from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, Rope, require_number


@dataclass(frozen=True, kw_only=True)
class Slowed(Rope):
    """All frequencies but the first are divided by `divisor`."""

    name = "slowed"
    aliases = ("slow",)
    paper = "none"
    summary = "all frequencies but the first are divided"

    divisor: float = 2.0

    def __post_init__(self):
        require_number(self.name, "divisor", self.divisor, least=0, strictly=True)

    def frequencies(self, geometry: Geometry):
        inv_freq = inverse_frequencies(geometry.theta, geometry.rotary_dim)
        inv_freq[1:] /= self.divisor
        return inv_freq, 1.0
'''
GOLDEN = '{"geometry": {"head_dim": 4, "rotary_dim": 4, "theta": 10000}, "parameters": {"divisor": 4}, "inv_freq": [1, 0.0025], "attention_scale": 1, "float64": true}'


@pytest.fixture
def _added(tmp_path, monkeypatch):
    (tmp_path / "slowed.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(hfpos.schemes, "__path__", [*hfpos.schemes.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    before = hfpos.schemes()
    hfpos.schemes.REGISTRY.discover("hfpos.schemes", Scheme)
    assert hfpos.schemes().keys() - before.keys() == {"slowed"}
    yield
    hfpos.schemes.REGISTRY.remove("slowed")
    del sys.modules["hfpos.schemes.slowed"]
    del hfpos.schemes.slowed
    assert hfpos.schemes() == before


@pytest.mark.usefixtures("_added")
def test_a_file_is_all_that_a_scheme_needs(tmp_path):
    entry = json.loads(GOLDEN)
    check_rotation(entry, hfpos.schemes.REGISTRY["slow"].create(**entry["parameters"]))
    for model_type in ("llama", "gpt2", *OWN_ATTENTION):
        model = hfpos.patch(unpatched(model_type), "slow", divisor=4)
        assert hfpos.describe(model).proved
        turns = torch.tensor(hfpos.describe(model).wavelengths) / torch.tensor(
            hfpos.describe(hfpos.patch(unpatched(model_type), "rope")).wavelengths
        )
        torch.testing.assert_close(turns, torch.tensor([1.0] + [4.0] * 7), rtol=1e-5, atol=0)
        model(tokens(2, 60), labels=tokens(2, 60)).loss.backward()
        model.save_pretrained(tmp_path / model_type)
        again = hfpos.from_pretrained(tmp_path / model_type)
        assert torch.equal(logits(again, 60), logits(model, 60))
        assert torch.equal(logits(hfpos.unpatch(model)), logits(unpatched(model_type)))
    with pytest.raises(hfpos.PatchError, match=r"slowed: divisor=0 is not usable; expected a finite number > 0"):
        hfpos.patch(unpatched("llama"), "slowed", divisor=0)


def test_a_scheme_outside_of_the_package_is_entered_by_whoever_imports_it(tmp_path):
    path = tmp_path / "slowed.py"
    path.write_text(f"{SOURCE}\n\nREGISTRY.add(Slowed.name, Slowed, Slowed.aliases)\n", encoding="utf-8")
    assert len(path.read_text(encoding="utf-8").splitlines()) < 150
    spec = importlib.util.spec_from_file_location("slowed", path)
    module = importlib.util.module_from_spec(spec)
    module.REGISTRY = hfpos.schemes.REGISTRY
    sys.modules["slowed"] = module  # where dataclasses look types up
    try:
        spec.loader.exec_module(module)
        assert all_examples()["slowed"] == module.Slowed(), "make matrix tries it without more ado"
        model = hfpos.patch(unpatched("llama"), "slow", divisor=4)
        model.save_pretrained(tmp_path / "saved")
        again = hfpos.from_pretrained(tmp_path / "saved")
        assert torch.equal(logits(again, 60), logits(model, 60))
    finally:
        hfpos.schemes.REGISTRY.remove("slowed")
        del sys.modules["slowed"]
    with pytest.raises(hfpos.PatchError, match="unknown scheme 'slowed'"):
        hfpos.from_pretrained(tmp_path / "saved")


def test_it_is_gone_afterwards():
    with pytest.raises(hfpos.PatchError, match="unknown scheme 'slowed'"):
        hfpos.patch(unpatched("llama"), "slowed")


def test_a_second_scheme_of_the_same_name_is_refused(tmp_path, monkeypatch):
    (tmp_path / "impostor.py").write_text(SOURCE.replace('"slowed"', '"yarn"'), encoding="utf-8")
    monkeypatch.setattr(hfpos.schemes, "__path__", [*hfpos.schemes.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    before = hfpos.schemes()
    with pytest.raises(
        hfpos.PatchError, match=r"scheme 'yarn' is defined twice: hfpos\.schemes\.yarn and hfpos\.schemes\.impostor"
    ):
        hfpos.schemes.REGISTRY.discover("hfpos.schemes", Scheme)
    del sys.modules["hfpos.schemes.impostor"]
    del hfpos.schemes.impostor
    assert hfpos.schemes() == before
