"""Chunked linear cross entropy against the whole one in float64: torch's kernel, ours, and what is handed to Liger's."""

import types

import pytest
import torch
from torch.nn import functional as F

from hfpos import PatchError
from hfpos.train import loss as module
from hfpos.train.loss import kernel_for, linear_cross_entropy
from tests.train.allocations import allocations


KERNELS = ("torch", "hfpos") if hasattr(torch.nn, "LinearCrossEntropyOptions") else ("hfpos",)  # torch's from 2.13
SHAPE = (23, 301, 12)  # tokens, vocabulary, width: nothing divides the chunk of 7


def problem(dtype=torch.float32, bias=False, size=1.0):
    tokens, vocabulary, width = SHAPE
    torch.manual_seed(0)
    hidden = (size * torch.randn(tokens, width)).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,))
    labels[[0, 5, 6, 22]] = -100
    labels[[1, 2]] = torch.tensor([0, vocabulary - 1])
    return hidden, weight, labels, torch.randn(vocabulary).to(dtype).requires_grad_() if bias else None


def whole(hidden, weight, labels, bias=None, scale=1.0, softcap=None):
    """Loss and gradients from whole logits, in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias) if leaf is not None]
    logits = F.linear(*leaves) * scale
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return [loss, *torch.autograd.grad(loss, leaves)]


def chunked(hidden, weight, labels, bias=None, **options):
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=7, **options)
    return [loss, *torch.autograd.grad(loss, leaves)]


def assert_equal(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    monkeypatch.setattr(module, "kernel_for", lambda hidden, softcap: request.param)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_equals_the_whole(kernel, bias, scale):
    given = problem(bias=bias)
    assert_equal(chunked(*given, scale=scale), whole(*given, scale=scale))


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"softcap": 3.0, "scale": 0.37}])
def test_softcap(options):
    given = problem(bias=True, size=3.0)
    assert_equal(chunked(*given, **options), whole(*given, **options))
    assert not torch.allclose(chunked(*given, **options)[0], chunked(*given)[0])


def test_float64_stays_float64():
    given = problem(torch.float64)
    found = chunked(*given, scale=2.0)
    assert found[0].dtype == torch.float64
    assert_equal(found, whole(*given, scale=2.0), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_float32(dtype):
    hidden, weight, labels, bias = problem(dtype, bias=True)
    repeated = hidden.detach().repeat(40, 1).requires_grad_(), weight, labels.repeat(40), bias
    found, expected = chunked(*repeated), whole(*repeated)
    assert found[0].dtype == torch.float32
    assert abs(found[0] - expected[0]) < 1e-3 * expected[0]
    assert [gradient.dtype for gradient in found[1:]] == [dtype] * 3
    assert_equal(found[1:], expected[1:], 0.01)


def test_autocast_computes_in_its_dtype():
    hidden, weight, labels, bias = problem(bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked(hidden.bfloat16(), weight, labels, bias)
    assert [part.dtype for part in found] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    assert_equal(found, whole(hidden, weight, labels, bias), 0.03)


def test_labels_that_count_nothing(kernel):
    hidden, weight, labels, _ = problem()
    for given in ((hidden, weight, torch.full_like(labels, -100)), (hidden[:0], weight, labels[:0])):
        loss, *gradients = chunked(*given)
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients)


def test_strides(kernel):
    hidden, weight, labels, _ = problem()
    strided = [x.detach().T.contiguous().T.requires_grad_() for x in (hidden, weight)]
    assert not strided[0].is_contiguous()
    assert_equal(chunked(*strided, labels.repeat(2)[::2]), whole(hidden, weight, labels.repeat(2)[::2]))


def test_only_the_gradients_that_are_needed(kernel):
    hidden, weight, labels, bias = problem(bias=True)
    expected = whole(hidden, weight, labels, bias)
    for frozen in ({0}, {1}, {1, 2}):
        leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate((hidden, weight, bias))]
        with allocations() as made:
            loss = linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], chunk=7)
            loss.backward()
        assert [leaf.grad is None for leaf in leaves] == [i in frozen for i in range(3)]
        found = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert_equal(found, [gradient for i, gradient in enumerate(expected[1:]) if i not in frozen])
        assert (weight.nbytes in made) == (1 not in frozen)
    with torch.no_grad(), allocations() as made:
        assert_equal([linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=7)], expected[:1])
    assert weight.nbytes not in made


def test_never_all_logits(kernel):
    hidden, weight = torch.randn(400, 8).requires_grad_(), torch.randn(500, 8).requires_grad_()
    labels = torch.randint(500, (400,))
    with allocations() as made:
        linear_cross_entropy(hidden, weight, labels, chunk=16).backward()
    assert max(made) == 4 * 16 * 500
    with allocations() as made:
        F.cross_entropy(hidden @ weight.T, labels).backward()
    assert max(made) == 4 * 400 * 500


def test_the_upstream_gradient_counts(kernel):
    hidden, weight, labels, _ = problem()
    (linear_cross_entropy(hidden, weight, labels, chunk=7) / 19 + hidden.sum()).backward()
    expected = whole(hidden, weight, labels)
    assert_equal([hidden.grad, weight.grad], [expected[1] / 19 + 1, expected[2] / 19])


def test_a_second_backward_fails(kernel):
    hidden, weight, labels, _ = problem()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def test_which_kernel():
    def on_cuda(**changes):
        cuda = {"device": torch.device("cuda"), "shape": (3, 8), "requires_grad": True, "dtype": torch.bfloat16}
        return types.SimpleNamespace(**cuda | changes)

    plain = torch.zeros(2, 8)
    assert kernel_for(plain) == KERNELS[0]
    assert kernel_for(plain, softcap=30.0) == kernel_for(plain.bfloat16()) == kernel_for(plain.double()) == "hfpos"
    assert kernel_for(on_cuda()) == "hfpos"  # Liger is not installed


def test_liger_gets_what_it_needs(monkeypatch):
    def liger(hidden, weight, target, bias, ignore_index, reduction, softcap, accum_dtype):
        assert (ignore_index, reduction, accum_dtype) == (-100, "sum", torch.float32)
        logits = torch.tanh(F.linear(hidden, weight, bias) / softcap) * softcap
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    monkeypatch.setattr(module, "_liger", lambda: liger)
    cuda = types.SimpleNamespace(device=torch.device("cuda"), shape=(3, 8), requires_grad=True)
    assert kernel_for(cuda) == "liger"
    cuda.requires_grad, cuda.dtype = False, torch.bfloat16  # Liger would leave the weight without a gradient
    assert kernel_for(cuda) == "hfpos"
    monkeypatch.setattr(module, "kernel_for", lambda hidden, softcap: "liger")
    given = problem(bias=True)
    options = {"scale": 0.37, "softcap": 3.0}
    assert_equal(chunked(*given, **options), whole(*given, **options))


@pytest.mark.parametrize(("at", "shape"), [(0, (23, 11)), (0, (1, 23, 12)), (2, (22,)), (3, (300,))])
def test_shapes_that_do_not_fit(at, shape):
    given = list(problem(bias=True))
    given[at] = torch.zeros(shape)
    with pytest.raises(PatchError, match="flatten batch and tokens"):
        linear_cross_entropy(*given[:3], bias=given[3])
