"""What holds for every bias: gradients, far and future keys, shifts, factors, dtypes, batches, bad parameters."""

import json

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

import hfpos
from hfpos.scheme import Bias, Geometry, PatchError
from hfpos.schemes.alibi import alibi_slopes


FIXED = [
    ("alibi", {}),
    ("alibi", {"bidirectional": True}),
    ("alibi", {"bidirectional": "split"}),
    ("alibi", {"slopes_ahead": [0.1, 0.7]}),
    ("sandwich", {"dim": 6}),
    ("sandwich", {"variant": "nemo"}),
]
LEARNED = [
    ("kerple", {"r2": [0.2, 1.5]}),
    ("kerple", {"kind": "power", "r1": [0.3, 1.0], "r2": 0.6}),
    ("kerple", {"kind": "power", "r2": 2}),
    ("fire", {"hidden": 3, "threshold": 2.5}),
    ("t5", {"num_buckets": 6, "max_distance": 7}),
    ("t5", {"num_buckets": 8, "max_distance": 20, "bidirectional": True}),
    ("shaw", {"max_distance": 2}),
]
EVERY = FIXED + LEARNED
Q_POSITIONS, K_POSITIONS = torch.tensor([[0, 3, 131_071]]), torch.tensor([[0, 1, 3, 7, 131_071]])
ids = pytest.mark.parametrize(("name", "parameters"), EVERY, ids=str)


def build(name, parameters, dtype=torch.float64, heads=2):
    """The scheme, its weights with every zero table filled, and the queries that it reads, if any."""
    torch.manual_seed(0)
    scheme = hfpos.schemes()[name].create(**parameters)
    geometry = Geometry(heads=heads, head_dim=4, rotary_dim=4, theta=1e4, trained_length=None, allowed_length=None)
    scheme.check(geometry)
    weights = scheme.weights(geometry)
    assert all(values.dtype == torch.float64 and not values.isnan().any() for values in weights.values())
    filled = {key: values if values.any() else torch.randn_like(values) for key, values in weights.items()}
    return scheme, {key: values.to(dtype) for key, values in filled.items()}


def query_for(scheme, q_positions, dtype=torch.float64, heads=2):
    return torch.randn(1, heads, q_positions.shape[1], 4, dtype=dtype) if scheme.reads_query else None


def test_every_bias_is_tried():
    assert {name for name, _ in EVERY} == {name for name, cls in hfpos.schemes().items() if issubclass(cls, Bias)}
    assert {name for name, _ in LEARNED} == {name for name, _ in EVERY if hfpos.schemes()[name].learned}


@pytest.mark.parametrize(("name", "parameters"), LEARNED, ids=str)
def test_gradients_are_those_of_the_formula(name, parameters):
    scheme, weights = build(name, parameters)
    q_positions, k_positions = torch.tensor([[0, 1, 5]]), torch.tensor([[0, 2, 5, 11]])
    query = query_for(scheme, q_positions)
    inputs = [*weights.values()] + ([query] if scheme.reads_query else [])

    def bias(*values):
        given = dict(zip(weights, values, strict=False))
        return scheme.bias(q_positions, k_positions, given, values[-1] if scheme.reads_query else None)

    ending = parameters.get("r2") == 2  # where the exponent is at the end of its range and stays there
    assert torch.autograd.gradcheck(bias, [x.requires_grad_() for x in inputs], atol=1e-5)
    bias(*inputs).sum().backward()
    idle = [key for key, x in zip(weights, inputs, strict=False) if x.grad.abs().max() < 1e-6]
    assert idle == (["raw_r2"] if ending else [])


@ids
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_finite_for_far_and_future_keys_in_the_dtype_of_the_weights(name, parameters, dtype):
    scheme, weights = build(name, parameters, dtype)
    leaves = {key: values.requires_grad_() for key, values in weights.items()}
    bias = scheme.bias(Q_POSITIONS, K_POSITIONS, leaves, query_for(scheme, Q_POSITIONS))
    assert bias.dtype == dtype
    assert bias.shape == (1, 2, 3, 5)
    # of 15: those behind the query in one head, those ahead of it in the other
    hidden = 6 if parameters.get("bidirectional") == "split" else 0
    assert (~bias.isfinite()).sum((0, 2, 3)).tolist() == [hidden, hidden]
    bias.sum().backward()
    assert all(values.grad.isfinite().all() for values in leaves.values())


@pytest.mark.parametrize(("name", "parameters"), LEARNED, ids=str)
def test_finite_wherever_training_takes_the_weights(name, parameters):
    for value in (-200.0, -1.0, 0.0, 50.0):
        scheme, weights = build(name, parameters, torch.float32)
        leaves = {key: torch.full_like(values, value).requires_grad_() for key, values in weights.items()}
        distances = torch.tensor([[-5, 0, 1, 4000]])
        bias = scheme.bias(distances, torch.zeros(1, 1).long(), leaves, query_for(scheme, distances))
        bias.sum().backward()
        assert all(x.isfinite().all() for x in (bias, *(values.grad for values in leaves.values())))
        if name == "kerple":
            assert (bias <= 0).all()


@ids
@pytest.mark.parametrize("heads", [12, 40])
def test_any_number_of_heads_and_rows(name, parameters, heads):
    parameters = {key: value for key, value in parameters.items() if not isinstance(value, list)}
    scheme, weights = build(name, parameters, heads=heads)
    q_positions, k_positions = torch.tensor([[3, 4], [7, 9]]), torch.tensor([[0, 3, 4], [5, 9, 2]])
    query = query_for(scheme, q_positions, heads=heads)
    both = query.expand(2, -1, -1, -1) if scheme.reads_query else None
    bias = scheme.bias(q_positions, k_positions, weights, both)
    assert bias.shape == (2, heads, 2, 3)
    rows = [scheme.bias(q_positions[[b]], k_positions[[b]], weights, query) for b in range(2)]
    torch.testing.assert_close(bias, torch.cat(rows))
    if scheme.reads_query:  # a row of positions for many rows of queries
        torch.testing.assert_close(
            scheme.bias(q_positions[:1], k_positions[:1], weights, both), rows[0].expand_as(bias)
        )
    else:
        assert len(bias[0, :, 0, 0].unique()) > 1


@pytest.mark.parametrize(
    ("name", "parameters"), [case for case in EVERY if hfpos.schemes()[case[0]].relative], ids=str
)
def test_relative_means_that_distances_are_enough(name, parameters):
    scheme, weights = build(name, parameters)
    bias = scheme.bias(Q_POSITIONS, K_POSITIONS, weights)
    torch.testing.assert_close(scheme.bias(Q_POSITIONS + 4321, K_POSITIONS + 4321, weights), bias, rtol=0, atol=1e-9)
    distances = (Q_POSITIONS[:, :, None] - K_POSITIONS[:, None, :]).flatten(1)
    by_distance = scheme.bias(distances, torch.zeros(1, 1).long(), weights)[0, :, :, 0]
    torch.testing.assert_close(by_distance.view(2, 3, 5), bias[0], rtol=0, atol=1e-9)


def test_fire_depends_on_the_position_beyond_its_threshold():
    scheme, weights = build("fire", {"threshold": 100})
    rows = scheme.bias(torch.tensor([[50, 99, 1000]]), torch.tensor([[0]]), weights)[0, :, :, 0]
    near = scheme.bias(torch.tensor([[60, 109, 1010]]), torch.tensor([[10]]), weights)[0, :, :, 0]
    same = torch.isclose(rows, near, rtol=0, atol=1e-9)
    assert same.tolist() == [[True, False, False]] * 2


@ids
def test_two_sided_says_whether_a_key_behind_its_query_counts(name, parameters):
    scheme, weights = build(name, parameters)
    positions = torch.tensor([[2]])
    query = torch.ones(1, 2, 1, 4) if scheme.reads_query else None
    here, behind = (scheme.bias(positions, positions + step, weights, query)[0, 0, 0, 0] for step in (0, 1))
    if name != "alibi":  # which rewards such a key where it is not two-sided
        assert scheme.two_sided == bool(here != behind)
    if (
        scheme.two_sided
        and name not in ("t5", "shaw")
        and parameters.keys().isdisjoint({"slopes_ahead"})
        and parameters.get("bidirectional") != "split"
    ):
        before = scheme.bias(positions, positions - 1, weights)[0, 0, 0, 0]
        torch.testing.assert_close(before, behind)


@ids
@pytest.mark.parametrize("shift", [0, -70_000])
def test_factors_give_the_bias_up_to_a_constant_of_each_row(name, parameters, shift):
    scheme, weights = build(name, parameters)
    q_positions, k_positions = Q_POSITIONS, K_POSITIONS
    factors = scheme.factors(q_positions + shift, k_positions + shift, weights)
    assert (factors is not None) == (name == "sandwich" or parameters == {})
    if factors is not None:
        f, g = factors
        assert f.shape[:2] == (1, 2)
        assert f.shape[-1] == g.shape[-1] == (scheme.dim if name == "sandwich" else 1)
        missing = scheme.bias(q_positions, k_positions, weights) - f @ g.mT
        torch.testing.assert_close(missing, missing[..., :1].expand_as(missing), rtol=0, atol=1e-8)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("sizes", [(32, 128), (64, 256), (32, 20), (8, 64), (34, 1000), (4, 3), (128, 8192)], ids=str)
def test_t5_buckets_are_those_of_transformers(sizes, bidirectional):
    buckets, max_distance = sizes
    relative = torch.cat((torch.arange(-600, 601), torch.tensor([-131_071, -8192, -8191, 8191, 8192, 131_071])))
    expected = T5Attention._relative_position_bucket(relative, bidirectional, buckets, max_distance)
    scheme = hfpos.schemes.T5(num_buckets=buckets, max_distance=max_distance, bidirectional=bidirectional)
    assert torch.equal(scheme.buckets(-relative), expected)


def test_sandwich_keeps_its_accuracy_in_float32():
    scheme, weights = build("sandwich", {}, heads=12)
    single = {key: values.float() for key, values in weights.items()}
    exact, found = (scheme.bias(Q_POSITIONS, K_POSITIONS, given) for given in (weights, single))
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_learned_biases_start_where_they_say():
    geometry = Geometry(heads=6, head_dim=4, rotary_dim=4, theta=1e4, trained_length=None, allowed_length=None)
    positions = torch.arange(9)[None]
    alibi = hfpos.schemes.Alibi(bidirectional=True)
    power = hfpos.schemes.Kerple(kind="power")
    expected = alibi.bias(positions, positions, alibi.weights(geometry))
    torch.testing.assert_close(power.bias(positions, positions, power.weights(geometry)), expected)
    r1, r2 = hfpos.schemes.Kerple().positive(hfpos.schemes.Kerple().weights(geometry))
    assert r1.tolist() == pytest.approx(alibi_slopes(6))
    assert r2.tolist() == pytest.approx([1.0] * 6)
    for name in ("t5", "shaw"):
        assert not hfpos.schemes()[name].create().weights(geometry)["table"].any()
    fire = hfpos.schemes.Fire().weights(geometry)
    torch.manual_seed(1)
    again = hfpos.schemes.Fire().weights(geometry)
    assert all(torch.equal(fire[key], again[key]) for key in fire)
    assert fire["hidden_weight"].abs().max() <= 1
    assert fire["output_weight"].abs().max() <= 32**-0.5
    assert len(fire["output_weight"].unique()) == 6 * 32


def test_shaw_asks_for_its_queries():
    scheme, weights = build("shaw", {})
    with pytest.raises(PatchError, match="pass query="):
        scheme.bias(Q_POSITIONS, K_POSITIONS, weights)


@ids
def test_parameters_survive_json(name, parameters):
    scheme = hfpos.schemes()[name].create(**parameters)
    assert hfpos.schemes()[name].create(**json.loads(json.dumps(scheme.parameters()))) == scheme


def test_kerple_takes_any_sequence():
    given = hfpos.schemes.Kerple(r1=(1, 2), r2=torch.tensor([0.5, 1.0]))
    assert given.parameters() == {"kind": "log", "r1": [1.0, 2.0], "r2": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("kerple", {"kind": "lgo"}, "kerple: kind='lgo' is unknown: did you mean 'log'"),
        ("kerple", {"r1": 0}, "kerple: r1=0 is not usable; expected a finite number > 0"),
        ("kerple", {"r2": [1.0, float("nan")]}, "kerple: r2=nan is not usable"),
        ("kerple", {"r1": "steep"}, "kerple: r1='steep' is not usable; expected a list of numbers, one for each head"),
        ("kerple", {"kind": "power", "r2": 2.5}, "kerple: r2=2.5 is not usable; expected at most 2"),
        ("kerple", {"r1": [1.0] * 3}, "kerple: 3 values of r1 were given, the model has 2 attention heads"),
        ("kerple", {"r2": []}, "kerple: 0 values of r2 were given, the model has 2 attention heads"),
        ("sandwich", {"dim": 7}, "sandwich: dim=7 is not usable; expected an even whole number >= 2"),
        ("sandwich", {"dim": 0}, "sandwich: dim=0 is not usable"),
        ("sandwich", {"variant": "nemi"}, "sandwich: variant='nemi' is unknown: did you mean 'nemo'"),
        ("fire", {"hidden": 2.0}, "fire: hidden=2.0 is not usable; expected a whole number >= 1"),
        ("fire", {"c": 0}, "fire: c=0 is not usable"),
        ("fire", {"threshold": -1}, "fire: threshold=-1 is not usable"),
        ("t5", {"num_buckets": 1}, "t5: num_buckets=1 is not usable; expected a whole number >= 2"),
        ("t5", {"num_buckets": 5, "bidirectional": True}, "t5: num_buckets=5 is not usable; expected an even"),
        ("t5", {"max_distance": 16}, "t5: max_distance=16 is not usable; expected more than the 16 distances"),
        ("t5", {"max_distance": 2.5}, "t5: max_distance=2.5 is not usable"),
        ("shaw", {"max_distance": 0}, "shaw: max_distance=0 is not usable"),
        ("shaw", {"length": 3}, "'shaw' has no parameter 'length'"),
    ],
    ids=str,
)
def test_bad_parameters_are_named(name, parameters, message):
    with pytest.raises(PatchError) as error:
        build(name, parameters)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
