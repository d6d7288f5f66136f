"""The mathematics of every scheme against numbers that other people's code gave; `tests/golden/<scheme>.json` says which and how.

A reference run in float64 must agree to the ten digits kept, one run in float32 to 3e-6. Biases are computed from float32
weights as well, and must then agree to 1e-6.
"""

import json
from pathlib import Path

import pytest
import torch

import hfpos
from hfpos.attention.near_far import NearFarRotation
from hfpos.positions import Call
from hfpos.rotation import cos_sin, inverse_frequencies, rotate
from hfpos.scheme import Geometry


GOLDEN = Path(__file__).parents[1] / "golden"
WITHOUT_NUMBERS = {"learned", "nope"}  # the one resizes what was trained, the other does nothing


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
        assert float(scale) == pytest.approx(entry["attention_scale"], rel=1e-9 if exact else 3e-6)
    if "inv_freq" in entry:
        expected = torch.tensor(entry["inv_freq"], dtype=torch.float64)
        torch.testing.assert_close(inv_freq[list(pairs)], expected, rtol=1e-9 if exact else 3e-6, atol=0)
    if "cos" in entry:
        table = cos_sin(torch.tensor(entry["positions"]), inv_freq[list(pairs)], scale)
        for found, name in zip(table, ("cos", "sin"), strict=True):
            # a float32 run has angles of thousands of radians, a float64 one rounds its table to float32 at the end
            expected = torch.tensor(entry[name], dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=0, atol=4e-8 if exact else 1e-3)


def check_bias(entry, scheme):
    if "slopes" in entry:
        assert scheme.head_slopes(entry["heads"]) == pytest.approx(entry["slopes"], rel=1e-9)
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
        (torch.float64, {"rtol": 1e-8, "atol": 1e-12}),
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
    if "up_to_constant" in entry:
        bias, expected = bias - bias[:, :1], expected - expected[:, :1]
    return bias, expected


def check_table(entry, scheme):
    table = scheme.table(torch.tensor(entry["positions"], dtype=torch.float64), entry["width"])
    if entry["layout"] == "halves":
        table = torch.cat((table[:, 0::2], table[:, 1::2]), dim=-1)
    torch.testing.assert_close(table, torch.tensor(entry["table"], dtype=torch.float64), rtol=0, atol=1e-9)


def check_attention(entry, scheme):
    q, k, v = (
        torch.tensor(load(scheme.name)["tensors"][entry["tensors"]][name], dtype=torch.float64) for name in "qkv"
    )
    length, width = q.shape[2:]
    geometry = Geometry(
        heads=q.shape[1],
        head_dim=width,
        rotary_dim=width,
        theta=entry["theta"],
        trained_length=4096,
        allowed_length=4096,
    )
    positions = torch.arange(length)
    scheme.check(geometry)
    far = scheme.far_positions(geometry, positions)
    assert [x.tolist() for x in far] == [entry["q_far"], entry["k_far"]]
    for i, row in enumerate(entry.get("distances", [])):
        assert [(i - j if i - j < scheme.window else far[0][i] - far[1][j]) for j in range(i + 1)] == row
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = q.shape[1] // k.shape[1], True
    seam = NearFarRotation(scheme, geometry, "half")
    call = Call(seam, positions[None], positions[None], length)
    expected = torch.tensor(entry["output"], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        inputs = (x.to(dtype) for x in (q, k, v))
        output, _ = seam.attend(module, *inputs, None, call=call, backend="sdpa")
        torch.testing.assert_close(output[0].transpose(0, 1).double(), expected, rtol=0, atol=1e-6)


CHECKS = {"geometry": check_rotation, "heads": check_bias, "width": check_table, "tensors": check_attention}


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
    inv_freq, scale = inverse_frequencies(entry["theta"], entry["rotary_dim"]), 1.0
    if "scheme" in entry:
        length = entry["original_length"]
        geometry = Geometry(
            heads=1,
            head_dim=x.shape[-1],
            rotary_dim=entry["rotary_dim"],
            theta=entry["theta"],
            trained_length=length,
            allowed_length=length,
        )
        inv_freq, scale = hfpos.schemes()[entry["scheme"]].create(**entry["parameters"]).frequencies(geometry)
    positions = torch.tensor(setting["positions"])
    expected = torch.tensor(entry[name], dtype=torch.float64)
    rotated = rotate(x, *cos_sin(positions, inv_freq, scale), entry["convention"])
    torch.testing.assert_close(rotated, expected, rtol=0, atol=2e-8)
    # float32, as models run: angles of 32,767 radians carry an error of up to 1e-3
    single = rotate(x.float(), *cos_sin(positions, inv_freq.float(), scale), entry["convention"])
    far = max(setting["positions"]) > 1000
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=3e-3 if far else 2e-6)


def test_ntk_by_parts_is_yarn_without_its_temperature():
    for entry in load("yarn")["entries"]:
        if "inv_freq" in entry and not {"mscale", "attention_factor"} & entry["parameters"].keys():
            geometry = geometry_of(entry)
            inv_freq, scale = hfpos.schemes.NtkByParts(**entry["parameters"]).frequencies(geometry)
            yarn, temperature = hfpos.schemes.Yarn(**entry["parameters"], attention_factor=1.0).frequencies(geometry)
            assert torch.equal(inv_freq, yarn)
            assert scale == temperature == 1.0
