"""The mathematics of every scheme against numbers that other people's code gave; `tests/golden/<scheme>.json` says which and how.

A reference run in float64 must agree to the ten digits that are kept of it and 1e-12, one run in float32 to 2e-6. What is
computed in float32 here must agree to 1e-6.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import hfpos
from hfpos.rotation import cos_sin
from hfpos.scheme import Geometry


GOLDEN = Path(__file__).parents[1] / "golden"
# one resizes what was trained, or learns from zeros; one does nothing; the others hand on to other schemes
WITHOUT_NUMBERS = {"learned", "nope", "per_layer", "encoder_decoder"}
DIGITS = {"rtol": 5.01e-10, "atol": 1e-12}  # half a unit of the tenth digit
SINGLE = {"rtol": 2e-6, "atol": 0}


def load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def entries():
    return [
        pytest.param(path.stem, entry, id=f"{path.stem}-{number}")
        for path in sorted(GOLDEN.glob("*.json"))
        if path.stem in hfpos.schemes()
        for number, entry in enumerate(load(path.stem)["entries"])
    ]


def geometry_of(entry):
    original = entry["geometry"].get("original_length", 4096)
    sizes = {key: value for key, value in entry["geometry"].items() if key != "original_length"}
    return Geometry(heads=8, trained_length=original, allowed_length=original, **sizes)


def check_rotation(entry, scheme):
    geometry = geometry_of(entry)
    scheme.check(geometry)
    if "length" in entry:
        inv_freq, scale = scheme.frequencies_at(geometry, torch.tensor(entry["length"]))
    else:
        inv_freq, scale = scheme.frequencies(geometry)
    exact = entry["float64"]
    assert inv_freq.dtype == torch.float64
    assert len(inv_freq) == geometry.rotary_dim // 2
    pairs = entry.get("pairs", range(len(inv_freq)))
    if "attention_scale" in entry:
        assert float(scale) == pytest.approx(entry["attention_scale"], rel=5.01e-10 if exact else 2e-6)
    if "inv_freq" in entry:
        expected = torch.tensor(entry["inv_freq"], dtype=torch.float64)
        torch.testing.assert_close(inv_freq[list(pairs)], expected, **(DIGITS | {"atol": 0} if exact else SINGLE))
    if "cos" in entry:
        table = cos_sin(torch.tensor(entry["positions"]), inv_freq[list(pairs)], scale)
        for found, name in zip(table, ("cos", "sin"), strict=True):
            # a float32 run has angles of thousands of radians, a float64 one rounds its table to float32 at the end
            expected = torch.tensor(entry[name], dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=0, atol=4e-8 if exact else 1e-3)


def check_bias(entry, scheme):
    if "slopes" in entry:
        assert scheme.head_slopes(entry["heads"]) == pytest.approx(entry["slopes"], rel=5.01e-10)
        return
    geometry = Geometry(
        heads=entry["heads"],
        head_dim=entry.get("head_dim", 16),
        rotary_dim=16,
        theta=1e4,
        trained_length=None,
        allowed_length=None,
    )
    scheme.check(geometry)
    weights = scheme.weights(geometry)
    for key, values in (load(scheme.name).get("weights", {}) | entry.get("weights", {})).items():
        given = torch.tensor(values, dtype=torch.float64)
        assert given.shape == weights[key].shape
        weights[key] = given
    q_positions, k_positions = bias_positions(entry)
    query = None
    if "query" in entry:
        query = torch.tensor(entry["query"], dtype=torch.float64) * geometry.head_dim**-0.5
    for dtype, tolerance in (
        (torch.float64, DIGITS),
        (torch.float32, {"rtol": 1e-6, "atol": 1e-6}),
    ):
        cast = {key: values.to(dtype) for key, values in weights.items()}
        found = scheme.bias(q_positions, k_positions, cast, query)[0]
        assert found.dtype == dtype
        torch.testing.assert_close(*comparable(entry, found.double()), **tolerance)


def bias_positions(entry):
    if "length" in entry:
        return (torch.arange(entry["length"])[None],) * 2
    if "runs" in entry:
        keys = torch.cat([torch.arange(first, last + 1) for first, last, _ in entry["runs"]])
        return torch.tensor([[600]]), 600 + keys[None]
    distances = torch.tensor(entry["distances"])
    return distances.max().view(1, 1), distances.max() - distances[None]


def comparable(entry, bias):
    """The bias (H, Q, K) and the published numbers, both without what they may differ in."""
    if "runs" in entry:
        buckets = [bucket for first, last, bucket in entry["runs"] for _ in range(first, last + 1)]
        return bias[0, 0], torch.tensor(buckets, dtype=torch.float64)
    kind = next(kind for kind in ("full", "causal", "row", "at_distance") if kind in entry)
    expected = torch.tensor(entry[kind], dtype=torch.float64)
    seen = torch.ones(bias.shape[1:]).tril().bool()
    if kind == "at_distance":
        bias = bias[:, 0]
    if kind == "row":  # for every query: equal after a shift by a constant for each, which the softmax takes away
        expected = expected[:, None].expand_as(bias)
        expected = expected - expected.diagonal(dim1=-2, dim2=-1)[:, :, None]
    if kind in ("causal", "row"):
        bias, expected = bias * seen, expected * seen
    if "constant" in entry:  # of each head, that the source leaves in
        bias = bias + torch.tensor(entry["constant"], dtype=torch.float64)[:, None]
    return bias, expected


def check_table(entry, scheme):
    expected = torch.tensor(entry["table"], dtype=torch.float64)
    alone = dataclasses.replace(scheme, dim=entry["width"])
    torch.testing.assert_close(alone(torch.tensor(entry["positions"], dtype=torch.float64)), expected, **DIGITS)
    torch.testing.assert_close(alone(torch.tensor(entry["positions"])).double(), expected, rtol=0, atol=1e-7)


def check_attention(entry, scheme):
    q, k, v = (
        torch.tensor(load(scheme.name)["tensors"][entry["tensors"]][name], dtype=torch.float64) for name in "qkv"
    )
    length, width = q.shape[2:]
    if "q_far" in entry:
        check_far_positions(entry, scheme, length, width)
    alone = scheme if scheme.original_length else dataclasses.replace(scheme, original_length=4096)
    expected = torch.tensor(entry["output"], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, DIGITS), (torch.float32, {"rtol": 0, "atol": 1e-6})):
        output = alone(*(x.to(dtype) for x in (q, k, v)), theta=entry["theta"])
        torch.testing.assert_close(output[0].double(), expected, **tolerance)


def check_far_positions(entry, scheme, length, width):
    geometry = Geometry(1, width, width, theta=entry["theta"], trained_length=4096, allowed_length=4096)
    scheme.check(geometry)
    far = scheme.far_positions(geometry, torch.arange(length))
    assert [x.tolist() for x in far] == [entry["q_far"], entry["k_far"]]
    for i, row in enumerate(entry.get("distances", [])):
        assert [(i - j if i - j < scheme.window else far[0][i] - far[1][j]) for j in range(i + 1)] == row


def check_scores(entry, scheme):
    """The weights that attention gives to each key, which come out where the values are the unit vectors, are those of the scores."""
    q, k, scores = (torch.tensor(entry[name], dtype=torch.float64)[None] for name in ("q", "k", "scores"))
    length, width = q.shape[2:]
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    expected = (scores * width**-0.5).masked_fill(later, float("-inf")).softmax(-1)
    values = torch.eye(length, width, dtype=torch.float64).expand_as(k)
    for dtype, tolerance in ((torch.float64, {"rtol": 0, "atol": 2e-9}), (torch.float32, {"rtol": 0, "atol": 1e-6})):
        inputs = (x.to(dtype) for x in (q, k, values))
        output = scheme(*inputs, theta=entry["theta"], convention=entry["convention"])
        torch.testing.assert_close(output[..., :length].double(), expected, **tolerance)
    geometry = Geometry(1, width, width, theta=entry["theta"], trained_length=None, allowed_length=None)
    zeta = scheme.decay(geometry) ** scheme.scale_base
    torch.testing.assert_close(zeta, torch.tensor(entry["zeta"], dtype=torch.float64), **DIGITS)


def check_rows(entry, scheme):
    """At which distances queries see the keys up to themselves."""
    geometry = Geometry(1, 8, 8, theta=1e4, trained_length=None, allowed_length=None)
    positions = torch.arange(entry["length"])[None]
    distances, seen = scheme.distances(geometry, positions, positions)
    assert seen.tril().equal(torch.ones_like(seen).tril())
    for query, row in entry["rows"].items():
        assert distances[0, int(query), : int(query) + 1].tolist() == row


CHECKS = {
    "geometry": check_rotation,
    "heads": check_bias,
    "width": check_table,
    "tensors": check_attention,
    "scores": check_scores,
    "rows": check_rows,
}


@pytest.mark.parametrize(("name", "entry"), entries())
def test_scheme_equals_the_published_numbers(name, entry):
    (check,) = (function for key, function in CHECKS.items() if key in entry)
    check(entry, hfpos.schemes()[name].create(**entry["parameters"]))


def test_every_scheme_has_numbers():
    others = {"rotation", "perplexity", "longlora"}
    assert set(hfpos.schemes()) - WITHOUT_NUMBERS == {path.stem for path in GOLDEN.glob("*.json")} - others


@pytest.mark.parametrize("number", range(len(load("rotation")["entries"])))
@pytest.mark.parametrize("name", ["q", "k"])
def test_rotation_equals_the_published_numbers(number, name):
    golden = load("rotation")
    entry = golden["entries"][number]
    setting = golden["settings"][entry["setting"]]
    x = torch.tensor(setting[name], dtype=torch.float64)
    scheme = hfpos.schemes.Rotary()
    if "scheme" in entry:
        scheme = hfpos.schemes()[entry["scheme"]].create(
            **entry["parameters"], original_length=entry["original_length"]
        )
    options = {key: entry[key] for key in ("theta", "rotary_dim", "convention")}
    expected = torch.tensor(entry[name], dtype=torch.float64)
    positions = torch.tensor(setting["positions"])
    far = max(setting["positions"]) > 1000  # angles of 32,767 radians carry an error of 1e-11 themselves
    for dtype, tolerance in (
        (torch.float64, DIGITS | ({"atol": 2e-11} if far else {})),
        (torch.float32, {"rtol": 1e-6, "atol": 1e-6}),
    ):
        rotated, _ = scheme(x.to(dtype), x.to(dtype), positions, **options)
        torch.testing.assert_close(rotated.double(), expected, **tolerance)


def test_ntk_by_parts_is_yarn_without_its_temperature():
    for entry in load("yarn")["entries"]:
        if "inv_freq" in entry and not {"mscale", "attention_factor"} & entry["parameters"].keys():
            geometry = geometry_of(entry)
            inv_freq, scale = hfpos.schemes.NtkByParts(**entry["parameters"]).frequencies(geometry)
            yarn, temperature = hfpos.schemes.Yarn(**entry["parameters"], attention_factor=1.0).frequencies(geometry)
            assert torch.equal(inv_freq, yarn)
            assert scale == temperature == 1.0
