"""Attention within groups, half of the heads shifted: against its definition, token by token, and the authors' numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hfpos.attention import shifted_groups
from hfpos.attention.shifted_groups import attend_in_groups, cut_rows, group_length
from hfpos.rotation import inverse_frequencies


GOLDEN = json.loads((Path(__file__).parents[1] / "golden/longlora.json").read_text())["entries"]
LENGTHS = (1, 7, 16, 17, 33, 100)
GROUP = 16


def who_sees_whom(length: int, size: int, heads: int, real: torch.Tensor, document: torch.Tensor) -> torch.Tensor:
    """The definition, token by token: (B, H, L, L). Padding sees itself."""
    seen = torch.zeros(len(real), 2, length, length, dtype=torch.bool)
    for row, valid in enumerate(real.tolist()):
        places = [i for i in range(length) if valid[i]]
        first, last = (places[0], places[-1]) if places else (0, -1)
        for half in range(2):
            shift = half * size // 2 if last - first >= size else 0
            for i in range(length):
                for j in range(i + 1):
                    near = (i - first + shift) // size == (j - first + shift) // size
                    together = valid[i] and valid[j] and document[row, i] == document[row, j]
                    seen[row, half, i, j] = i == j or (near and together)
    return seen[:, [int(head >= (heads + 1) // 2) for head in range(heads)]]


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention (B, L, H, D) with all logits held."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
    return (logits.softmax(-1) @ v).transpose(1, 2)


def example(length: int, heads: int = 4, key_heads: int = 2, batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Random q, k, v in float64 that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (heads, key_heads, key_heads)
    return [
        torch.randn(batch, h, length, 8, generator=generator, dtype=torch.float64).requires_grad_() for h in shapes
    ]


def compare(tensors: list[torch.Tensor], real: torch.Tensor, document: torch.Tensor | None = None) -> None:
    """Outputs at real tokens and all gradients of them equal the definition's."""
    length, heads = tensors[0].shape[2], tensors[0].shape[1]
    packed = document is not None
    document = torch.zeros_like(real, dtype=torch.int64) if document is None else document

    def sees(row: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
        return (key <= query) & (document[row, query] == document[row, key])

    given = None if bool(real.all()) else real
    groups = cut_rows(GROUP, tuple(real.shape), given, sees if packed else None, "cpu")
    expected = written_out(*tensors, who_sees_whom(length, GROUP, heads, real, document))
    found = attend_in_groups(groups, *tensors)
    assert torch.isfinite(found).all()
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights * real[:, :, None, None]
    assert ((found - expected) * real[:, :, None, None]).abs().max() < 1e-12
    for one, other in zip(
        *(torch.autograd.grad((x * weights).sum(), tensors) for x in (found, expected)), strict=True
    ):
        assert (one - other).abs().max() < 1e-12


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads", [(8, 4), (4, 1), (6, 3), (5, 5), (1, 1)])
def test_the_definition(length: int, heads: tuple[int, int]) -> None:
    compare(example(length, *heads, batch=1), torch.ones(1, length, dtype=torch.bool))


@pytest.mark.parametrize("entry", GOLDEN)
def test_the_authors_numbers(entry: dict[str, Any]) -> None:
    q, k, v = (torch.tensor(entry[name], dtype=torch.float64) for name in "qkv")
    length, size = q.shape[2], entry["group_size"]
    if entry["theta"] is not None:
        angles = torch.arange(length)[:, None] * inverse_frequencies(entry["theta"], q.shape[-1])
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (torch.complex(*x.chunk(2, -1)) * turn for x in (q, k))
        q, k = (torch.cat((x.real, x.imag), -1) for x in (q, k))
    found = attend_in_groups(cut_rows(size, (1, length), None, None, "cpu"), q, k, v).transpose(1, 2)
    assert (found - torch.tensor(entry["output"], dtype=torch.float64)).abs().max() < 1e-7
    if "wrapped" in entry:  # what this avoids
        start = found[:, entry["wrapped_heads"], : size // 2]
        assert (start - torch.tensor(entry["wrapped"], dtype=torch.float64)).abs().amax((0, 2, 3)).min() > 0.1


def masks() -> dict[str, torch.Tensor]:
    """Padding (rows, 64) of many kinds, each row another."""
    at = torch.arange(64)
    return {
        "behind": torch.stack([at < n for n in (64, 40, 8, 17, 1)]),
        "in front": torch.stack([at >= n for n in (0, 24, 56, 47, 63)]),
        "8 real tokens in all": torch.stack([at < 8, at >= 56, (at >= 20) & (at < 28)]),
        "both ends": torch.stack([(at >= 5) & (at < 50), (at >= 30) & (at < 40)]),
        "holes": torch.stack([at % 7 != 3, (at < 20) | (at > 30), at >= 9]),
        "nothing real": torch.stack([at < 0, at >= 3]),
    }


@pytest.mark.parametrize("kind", masks())
def test_padding(kind: str) -> None:
    real = masks()[kind]
    compare(example(64, batch=len(real)), real)


@pytest.mark.parametrize("padded", [False, True])
def test_packed_documents(padded: bool) -> None:
    real = torch.ones(2, 70, dtype=torch.bool)
    if padded:
        real[0, :9], real[1, 60:] = False, False
    document = torch.stack((torch.arange(70) // 23, (torch.arange(70) > 4).long()))
    compare(example(70), real, document)


@pytest.mark.parametrize("real", [None, torch.arange(50)[None] >= 7])
def test_no_token_sees_later_ones(real: torch.Tensor | None) -> None:
    tensors = example(50, 5, 5, batch=1)
    output = attend_in_groups(cut_rows(GROUP, (1, 50), real, None, "cpu"), *tensors)
    for head in range(5):
        for token in range(0 if real is None else 7, 50, 3):
            grads = torch.autograd.grad(output[0, token, head].sum(), tensors, retain_graph=True)
            reached = sum(grad.abs().sum((0, 1, 3)) for grad in grads).nonzero().flatten()
            assert reached.max() == token
            assert reached.min() >= (0 if real is None else 7)


@pytest.mark.parametrize(
    ("tokens_", "groups", "expected"), [(1, 4, 2), (8, 4, 2), (9, 4, 4), (100, 3, 34), (64, 1, 64)]
)
def test_group_length(tokens_: int, groups: int, expected: int) -> None:
    assert group_length(tokens_, groups, None) == expected


def test_bfloat16_and_dropout() -> None:
    tensors = [x.detach().bfloat16() for x in example(45)]
    groups = cut_rows(GROUP, (2, 45), None, None, "cpu")
    exact = attend_in_groups(groups, *(x.double() for x in tensors))
    assert (attend_in_groups(groups, *tensors).double() - exact).abs().max() < 0.02
    dropped = [attend_in_groups(groups, *tensors, dropout=0.5) for _ in range(2)]
    assert not torch.equal(*dropped)


def test_memory_grows_with_length_times_group(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = []

    def watched(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **_: Any
    ) -> torch.Tensor:
        largest.append(q.shape[0] * q.shape[2] * k.shape[2])
        assert mask is None or mask.numel() <= largest[-1]
        return q

    monkeypatch.setattr(shifted_groups, "scaled_dot_product_attention", watched)
    tensors = [x[..., :1] for x in example(2000, 2, 2, batch=1)]
    for sees in (None, lambda row, head, query, key: key <= query):
        attend_in_groups(cut_rows(GROUP, (1, 2000), None, sees, "cpu"), *tensors)
    assert max(largest) <= 2000 * GROUP
