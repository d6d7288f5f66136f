"""What a mask may show when a bias is added: nothing but which keys a query sees, and no later key unless the bias has a value for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfpos.attention.dense import causal as causal_mask
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from hfpos.scheme import Bias


def refuse_numbers(scheme: Bias, mask: torch.Tensor) -> None:
    """Raise `PatchError` where a 4-D `mask` that the user gave the model adds numbers of its own, a second bias."""
    if mask.dtype == torch.bool or torch.compiler.is_compiling() or _only_hides(mask):
        return
    raise PatchError(
        f"{scheme.name}: the attention mask adds numbers of its own to the logits, a second bias; expected 0 where a query sees a key and "
        "the dtype's minimum or -inf where it does not. Give a boolean mask, or take the scheme out with hfpos.unpatch"
    )


def check_mask(
    scheme: Bias,
    mask: torch.Tensor | None,
    causal: bool,
    queries: int,
    total: int | torch.Tensor,
    memo: dict[Any, Any],
) -> torch.Tensor | None:
    """The mask (B or 1, 1 or H, Q or 1, K): a boolean one, or additive where the model itself adds numbers in it.

    Args:
        mask: boolean or additive; None for what `causal` says.
        queries: Q.
        total: how many keys have been seen, those of these queries included; a static cache has room for more.
        memo: lives as long as the forward, so that each mask is looked at once and not in every layer.

    Raises:
        PatchError: the mask shows keys behind the query to a scheme that has no meaning for them.
    """
    if mask is None:
        if not causal and not scheme.two_sided and queries > 1:
            _refuse_future(scheme)
        return None
    known = ("mask", id(mask), scheme.two_sided)
    if known not in memo:
        # with the mask itself: while it is kept, its id is its own
        memo[known] = mask, _checked(scheme, mask, queries, total)
    return memo[known][1]


def visible(mask: torch.Tensor) -> torch.Tensor:
    """Which keys a boolean or additive mask shows."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def seen_span(seen: torch.Tensor) -> slice:
    """From the first to the last key (..., Q, K) that any query sees; one key that none does where there is no other."""
    if torch.compiler.is_compiling():  # which cannot look at the numbers
        return slice(None)
    index = seen.flatten(0, -2).any(0).nonzero()
    return slice(int(index[0]), int(index[-1]) + 1) if len(index) else slice(0, 1)


def _only_hides(mask: torch.Tensor) -> bool:
    return bool(((mask == 0) | ~visible(mask)).all())


def _checked(scheme: Bias, mask: torch.Tensor, queries: int, total: int | torch.Tensor) -> torch.Tensor:
    if mask.ndim != 4:
        raise PatchError(
            f"{scheme.name}: the attention mask has shape {tuple(mask.shape)}; expected (batch, 1 or heads, queries, keys), or a 2-D one "
            "given to the model"
        )
    if torch.compiler.is_compiling():  # which cannot look at the numbers
        return mask
    if not scheme.two_sided and queries > 1:
        keys = mask.shape[-1]
        first = min(int(total), keys) - queries
        if bool((visible(mask) & ~causal_mask(queries, keys, mask.device, first)).any()):
            _refuse_future(scheme)
    return visible(mask) if mask.dtype == torch.bool or _only_hides(mask) else mask


def _refuse_future(scheme: Bias) -> None:
    two_sided = "; pass bidirectional=True" if hasattr(scheme, "bidirectional") else ""
    raise PatchError(
        f"{scheme.name}: attention here is not causal, a query sees keys behind it, and this bias says nothing of those{two_sided}, or "
        "use a scheme that does, such as kerple"
    )
