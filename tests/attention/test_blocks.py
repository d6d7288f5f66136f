"""Blocks of queries: outputs and gradients against float64, for every scheme, length, mask and position, and what they hold."""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hfpos.attention.blocks import FEWEST
from tests.attention.exact import (
    BOTH_WAYS,
    HEADS,
    RELATIVE,
    SCHEMES,
    Example,
    attend,
    compare,
    difference,
    example,
    random_weights,
    reference,
    taken,
)


__all__ = ["taken"]
LENGTHS = [1, 2, 7, 255, 256, 257, 1025]
each_scheme = pytest.mark.parametrize("name", SCHEMES)


@pytest.mark.parametrize("length", LENGTHS)
@each_scheme
def test_causal_of_any_length(name: str, length: int, taken: list[str]) -> None:
    compare(name, example(length, batch=1 if length > 300 else 2))
    assert taken == ["row" if length == 1 else "view" if name in RELATIVE else "written"]


@pytest.mark.parametrize("length", [1, 2, 257])
@each_scheme
def test_the_same_with_the_mask_written_out(name: str, length: int, taken: list[str]) -> None:
    compare(name, example(length, batch=1 if length > 300 else 2).with_mask())
    assert taken[0] == ("row" if length == 1 else "features" if name == "alibi" else "written")


def window() -> Example:
    given = example(300)
    distance = given.q_positions[0][:, None] - given.k_positions[0]
    given.visible = given.visible & (distance < 70)
    return given.with_mask()


def padding() -> Example:
    """The second row begins 40 tokens later, so that its first queries see nothing."""
    given = example(300)
    given.visible = given.visible.repeat(2, 1, 1, 1)
    given.visible[1, :, :, :40] = False
    given.q_positions = given.k_positions = torch.stack((torch.arange(300), (torch.arange(300) - 40).clamp(min=0)))
    return given.with_mask()


def packing() -> Example:
    given = example(300)
    positions = torch.cat((torch.arange(110), torch.arange(190)))[None]
    document = (torch.arange(300) >= 110)[None]
    given.visible = given.visible & (document[:, None, :, None] == document[:, None, None, :])
    given.q_positions = given.k_positions = positions
    return given.with_mask()


def gap() -> Example:
    """Skipped ids, where nothing says what is seen but that attention is causal."""
    given = example(300)
    positions = torch.arange(300)
    given.q_positions = given.k_positions = torch.where(positions < 110, positions, positions + 900)[None]
    return given


def gap_and_mask() -> Example:
    return gap().with_mask()


def rows_apart() -> Example:
    """Rows that start elsewhere, which distances do not feel."""
    given = example(300)
    given.q_positions = given.k_positions = torch.arange(300) + torch.tensor([[3], [500]])
    return given


def chunk() -> Example:
    return example(130, 400)


def room() -> Example:
    """As in a static cache: slots behind the last key hold rubbish and stand nowhere."""
    given = example(60, 200)
    given.tensors[1:] = [torch.cat((x, 100 * torch.ones_like(x[:, :, :30])), dim=2) for x in given.tensors[1:]]
    given.k_positions = torch.nn.functional.pad(given.k_positions, (0, 30))
    given.visible = torch.nn.functional.pad(given.visible, (0, 30))
    return given.with_mask()


def window_and_chunk() -> Example:
    """A layer whose cache holds its window only: keys 270 .. 399."""
    given = example(30, 400)
    given.tensors[1:] = [x[:, :, 270:] for x in given.tensors[1:]]
    given.k_positions = given.k_positions[:, 270:]
    distance = given.q_positions[0][:, None] - given.k_positions[0]
    given.visible = ((distance >= 0) & (distance < 101))[None, None]
    return given.with_mask()


CASES = [window, padding, packing, gap, gap_and_mask, rows_apart, chunk, room, window_and_chunk]


@pytest.mark.parametrize("case", CASES)
@each_scheme
def test_masks_and_positions(name: str, case: Callable[[], Example]) -> None:
    compare(name, case())


@pytest.mark.parametrize("case", [window, padding])
@each_scheme
def test_eager_is_the_same(name: str, case: Callable[[], Example]) -> None:
    given = case()
    compare(name, given, "eager")
    given.mask = given.with_mask(torch.float32).mask
    compare(name, given, "eager")


@each_scheme
def test_float64_stays_exact(name: str) -> None:
    for given in (example(257), padding(), gap(), chunk()):
        compare(name, given.to(torch.float64), tolerance=1e-12)
    compare(name, padding().to(torch.float64), "eager", tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_scheme
@torch.no_grad()
def test_narrow_types_are_off_by_their_rounding(name: str, dtype: torch.dtype) -> None:
    bound = {torch.bfloat16: 0.02, torch.float16: 0.0025}[dtype]  # outputs are up to 3
    weights = random_weights(name)
    for given in (example(600, batch=1), padding(), chunk(), example(1, 600)):
        rounded = given.to(dtype)
        expected = reference(name, rounded, weights)
        for case in (rounded, rounded.with_mask(), rounded.with_mask(dtype)):
            output = attend(name, case, weights)
            assert output.dtype == dtype
            assert ((output.double() - expected) * case.real()).abs().max() < bound


@pytest.mark.parametrize("length", [2, 257])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_attention_that_is_not_causal(name: str, length: int, taken: list[str]) -> None:
    given = example(length)
    given.visible, given.causal = torch.ones_like(given.visible), False
    compare(name, given)
    assert taken == ["written" if name == "shaw" else "view"]
    compare(name, given.with_mask())
    compare(name, given, "eager")
    given.causal, given.options = True, {"is_causal": False}  # what the call says comes before what the module says
    compare(name, given)


# Dropout


def dropped(name: str, given: Example, backend: str, seed: int, learning: bool = True) -> list[torch.Tensor]:
    """The output, values and their gradient with half of the attention weights dropped, and the gradients of the learned weights."""
    torch.manual_seed(seed)
    weights = {key: value.requires_grad_(learning) for key, value in random_weights(name).items()}
    value = given.tensors[2].clone().requires_grad_()
    given = Example([*given.tensors[:2], value], *list(vars(given).values())[1:])
    output = attend(name, given, weights, backend, dropout=0.5)
    inputs = [value, *(weights.values() if learning else ())]
    return [output, value, *torch.autograd.grad(output.sum(), inputs)]


@pytest.mark.parametrize(
    ("backend", "learning"), [("sdpa", True), ("sdpa", False), ("eager", True)], ids=["sdpa", "frozen", "eager"]
)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@each_scheme
def test_dropout_keeps_the_mean_and_its_backward_drops_the_same(
    name: str, masked: bool, learning: bool, backend: str
) -> None:
    given = example(9).with_mask() if masked else example(9)
    first, again, other = (dropped(name, given, backend, seed, learning) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert difference(first[0].detach(), other[0].detach()) > 0.05
    for output, value, gradient, *more in (first, other):
        torch.testing.assert_close(
            (gradient * value).sum(), output.sum(), rtol=1e-5, atol=1e-4
        )  # as the output is linear in the values
        assert all(x.isfinite().all() for x in more)
    mean = torch.stack([dropped(name, given, backend, seed, learning)[0].detach() for seed in range(25)]).mean(0)
    error = mean - reference(name, given, random_weights(name))
    assert error.abs().mean() < 0.25
    calm = attend(name, given, random_weights(name), backend, dropout=0.0)
    assert difference(calm, reference(name, given, random_weights(name))) < 1e-5


# Memory


class Largest(TorchDispatchMode):
    """Notes the largest number of elements in the memory of any tensor that is made; a view makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run the operation and look at what it returns."""
        results = function(*args, **kwargs or {})
        for x in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return results


def held(name: str, length: int) -> tuple[int, int]:
    """For a causal forward and backward: elements of the largest tensor that is made, and of all that the forward leaves behind."""
    given = example(length, batch=1, heads=(HEADS, HEADS))
    given.tensors = [x.requires_grad_() for x in given.tensors]
    weights = {key: value.requires_grad_() for key, value in random_weights(name).items()}
    left: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        left[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = attend(name, given, weights).sum()
        loss.backward()
    return largest.elements, sum(left.values())


@each_scheme
def test_a_block_of_the_bias_is_the_most_that_is_ever_held(name: str) -> None:
    length = 2048
    largest, left = held(name, length)
    of_inputs = HEADS * length * 16
    fixed = name in RELATIVE and not random_weights(name)
    block = HEADS * FEWEST * (length + FEWEST)
    assert largest <= (2 * of_inputs if fixed else block)
    assert left < 12 * of_inputs
    assert block < length**2  # which says that neither is as large as even one head's bias
    smaller, before = held(name, length // 2)
    assert largest < 2.3 * smaller
    assert left < 2.3 * before


@pytest.mark.parametrize("name", ["alibi", "kerple", "t5", "sandwich"])
@torch.no_grad()
def test_a_decoded_token_makes_a_row_and_no_more(name: str) -> None:
    given, weights = example(1, 3000, batch=1, heads=(HEADS, HEADS)).with_mask(), random_weights(name)
    with Largest() as largest:
        attend(name, given, weights)
    assert largest.elements <= 6 * 3000 if name == "sandwich" else HEADS * 3000  # sandwich's own sinusoids are 6 wide
