"""The registries: what is found, what is refused."""

import pytest

import hfpos
from hfpos.registry import Registry
from hfpos.scheme import Scheme


def test_schemes_are_found_under_their_names():
    assert set(hfpos.schemes()) >= {
        *("abf", "alibi", "dynamic", "dynamic_yarn", "learned", "linear", "llama3", "longrope", "nope", "ntk"),
        *("ntk_by_parts", "partial", "rope", "sinusoidal", "yarn"),
    }
    assert list(hfpos.schemes()) == sorted(hfpos.schemes())
    for name, scheme in hfpos.schemes().items():
        assert scheme.name == name
        assert issubclass(scheme, Scheme)
        assert scheme.__module__ == f"hfpos.schemes.{name}"  # the file name is the registry name
        assert scheme.paper
        assert scheme.summary
        assert getattr(hfpos.schemes, scheme.__name__) is scheme


def test_families_are_found():
    assert set(hfpos.families()) >= {"bloom", "gpt2", "rotary"}


def test_the_listing_is_a_copy():
    hfpos.schemes().clear()
    assert "yarn" in hfpos.schemes()


def test_alias():
    assert hfpos.schemes.REGISTRY["pi"] is hfpos.schemes()["linear"]
    assert "pi" not in hfpos.schemes()


class First:
    pass


class Second:
    pass


@pytest.mark.parametrize("name", ["first", "one", "another"])
def test_duplicates_raise(name):
    registry = Registry("thing")
    registry.add("first", First, ("one",))
    aliases = ("one",) if name == "another" else ()
    with pytest.raises(
        hfpos.PatchError, match="thing '(first|one)' is defined twice: .*test_registry and .*test_registry"
    ):
        registry.add(name, Second, aliases)
    assert registry.as_dict() == {"first": First}
    assert registry["one"] is First


def test_what_was_removed_is_gone():
    registry = Registry("thing")
    registry.add("first", First, ("one",))
    registry.remove("first")
    registry.add("one", Second)
    assert registry.as_dict() == {"one": Second}
    with pytest.raises(hfpos.PatchError, match="unknown thing 'first': Available: one"):
        registry["first"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("yarm", "'yarn'"), ("Yarn", "'yarn'"), ("dynamic-yarn", "'dynamic_yarn'"), ("alibli", "'alibi'")],
)
def test_did_you_mean(name, hint):
    with pytest.raises(
        hfpos.PatchError, match=f"unknown scheme '{name}': did you mean {hint}\\? Available: abf, alibi"
    ):
        hfpos.schemes.REGISTRY[name]
