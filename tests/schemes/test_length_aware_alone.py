"""The schemes whose frequencies follow the length, called without a model, against their definition in float64."""

import math

import pytest
import torch

import hfpos
from hfpos.schemes import Dynamic, DynamicYarn, LongRope
from tests.pairs import difference


ORIGINAL, WIDTH, KEYS = 12, 8, 31


def frequencies(scheme: hfpos.scheme.Rope, length: int) -> tuple[list[float], float]:
    """The frequencies in use at a length, and the factor on cos and sin."""
    plain = [10_000 ** (-2 * i / WIDTH) for i in range(WIDTH // 2)]
    if isinstance(scheme, Dynamic):
        alpha = max(scheme.factor * length / ORIGINAL - (scheme.factor - 1), 1)
        return [(10_000 * alpha ** (WIDTH / (WIDTH - 2))) ** (-2 * i / WIDTH) for i in range(WIDTH // 2)], 1.0
    if isinstance(scheme, LongRope):
        divisors = scheme.long_factor if length > ORIGINAL else scheme.short_factor
        factor = math.sqrt(1 + math.log(2) / math.log(ORIGINAL))
        return [f / d for f, d in zip(plain, divisors, strict=True)], factor
    s = max(length / ORIGINAL, 1)
    # where a pair turns 32 times or once over the original length, in whole pairs
    turns = [WIDTH * math.log(ORIGINAL / (b * 2 * math.pi)) / (2 * math.log(10_000)) for b in (32, 1)]
    low, high = max(math.floor(turns[0]), 0), min(math.ceil(turns[1]), WIDTH - 1)
    ramp = [min(max((i - low) / max(high - low, 1e-3), 0), 1) for i in range(WIDTH // 2)]
    return [f * (1 - r) + f / s * r for f, r in zip(plain, ramp, strict=True)], 0.1 * math.log(s) + 1


def expected(scheme: hfpos.scheme.Rope, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every query sees all keys with the frequencies of its own length."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    first, rows = KEYS - q.shape[2], []
    for row in range(q.shape[2]):
        inv_freq, scale = frequencies(scheme, first + row + 1)
        half, here = WIDTH // 2, slice(0, first + row + 1)
        angle = (first + row - torch.arange(KEYS)[here].double())[:, None] * torch.tensor(
            inv_freq, dtype=torch.float64
        )
        one, other = (torch.complex(x[..., :half], x[..., half:]) for x in (q[:, :, row], k[:, :, here]))
        products = one[:, :, None] * other.conj() * torch.polar(torch.ones_like(angle), angle)
        logits = products.real.sum(-1) * scale**2 / WIDTH**0.5
        rows.append((logits.softmax(-1)[..., None] * v[:, :, here]).sum(-2))
    return torch.stack(rows, dim=2)


SCHEMES = [
    Dynamic(factor=3, original_length=ORIGINAL),
    DynamicYarn(original_length=ORIGINAL),
    LongRope(short_factor=[1, 1, 1.5, 2], long_factor=[1, 2, 4, 8], factor=2, original_length=ORIGINAL),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("queries", [1, 9, KEYS])
def test_attention_is_that_of_the_definition(scheme: hfpos.scheme.Rope, queries: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, tokens, WIDTH, generator=generator, dtype=torch.float64)
        for heads, tokens in ((4, queries), (2, KEYS), (2, KEYS))
    )
    exact = expected(scheme, q, k, v)
    assert difference(scheme.attend(q, k, v), exact) < 1e-12
    positions = torch.arange(KEYS)[None]
    assert difference(scheme.attend(q.float(), k.float(), v.float(), positions).double(), exact) < 2e-6


def test_what_cannot_be_alone() -> None:
    q = torch.zeros(1, 2, 3, WIDTH)
    with pytest.raises(
        hfpos.PatchError, match=r"dynamic: its frequencies differ .* call attend\(query, key, value\), or"
    ):
        SCHEMES[0](q, q, torch.arange(3))
    with pytest.raises(hfpos.PatchError, match=r"pinned to each prompt.* pass factor or target_length"):
        Dynamic(original_length=ORIGINAL, cache="pinned").attend(q, q, q)
    fixed = Dynamic(original_length=ORIGINAL, cache="pinned", factor=2)
    with pytest.raises(hfpos.PatchError, match=r"dynamic: .* one rotation for all; call it with \(q, k, positions\)"):
        fixed.attend(q, q, q)
    assert fixed(q, q, torch.arange(3))[0].shape == q.shape
