"""A sequence that several processes share: which part of it this one has, and what attention sees of it.

Two ways are known. DeepSpeed's Ulysses wraps an attention function of Transformers: in it the processes trade, so that each has all
tokens and a share of the heads. Torch's context parallel replaces `scaled_dot_product_attention`: each process keeps its queries, and
the keys of all come by in a ring. Positions are then those of the whole sequence, and a head is known by its place among all heads.

Shapes: B batch, T tokens of this process, S tokens of the whole sequence, H heads.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import distributed
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable


class Sharing(NamedTuple):
    """Who shares a sequence, and whether by heads (Ulysses) or in a ring."""

    group: Any
    by_heads: bool


class Part(NamedTuple):
    """What a process has of a shared sequence; travels in the `Call`.

    Attributes:
        rank: of this process.
        size: how many processes there are.
        by_heads: attention sees all tokens and a share of the heads; else the process's own queries, and all keys in turn.
        centre: (B, 1) int64, the middle of the whole sequence's positions, the same in every process.
        mask: (B, 1, S, S) boolean, what DeepSpeed's wrapper does not hand on; None where causality says all.
    """

    rank: int
    size: int
    by_heads: bool
    centre: torch.Tensor
    mask: torch.Tensor | None


def wrapped(function: Callable) -> list[Any]:
    """The function and the functions that it calls, as far as wrappers can be seen through: their closures and DeepSpeed's `attn`.

    >>> def twice(inner):
    ...     return lambda x: inner(inner(x))
    >>> abs in wrapped(twice(abs))
    True
    """
    found: list[Any] = []
    waiting: list[Any] = [function]
    while waiting:
        thing = waiting.pop()
        if any(thing is other for other in found):
            continue
        found.append(thing)
        held = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
        waiting += [x for x in (*held, getattr(thing, "attn", None)) if callable(x)]
    return found


def _ulysses(function: Callable) -> Any:
    """DeepSpeed's object in a registered attention function, if any."""
    return next((x for x in wrapped(function) if hasattr(x, "process_group")), None)


def require_ours(name: str, ours: Callable, stock: str | None) -> None:
    """Raise `PatchError` unless what is registered as `name` still ends in `ours`, and what that stands on does not trade heads.

    Args:
        name: an attention implementation of hfpos.
        ours: what hfpos registered.
        stock: the implementation of Transformers that it calls; None for a function of the family's own.
    """
    registered = ALL_ATTENTION_FUNCTIONS[name]
    lost = registered is not ours and not any(x is ours for x in wrapped(registered))
    if lost or (stock is not None and _ulysses(ALL_ATTENTION_FUNCTIONS[stock]) is not None):
        raise PatchError(
            f"the attention function {(name if lost else stock)!r} was replaced by {registered.__module__ if lost else 'DeepSpeed Ulysses'}, "
            f"which would lose the positional scheme; expected it around {name!r}: patch the model first, then set, with deepspeed>=0.19, "
            f"sp_handler.sp_attn_implementation = {name!r} (register_with_transformers: core_attn_implementation={name!r})"
        )


def sharing(decoder: Any) -> Sharing | None:
    """How the sequence of a forward is shared; None where this process has all of it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    kernel = torch.nn.functional.scaled_dot_product_attention
    if getattr(kernel, "__closure__", None):
        mesh = inspect.getclosurevars(kernel).nonlocals.get("device_mesh")
        if mesh is not None:
            return Sharing(mesh.get_group(), by_heads=False)
    name = decoder.config._attn_implementation
    found = _ulysses(ALL_ATTENTION_FUNCTIONS[name]) if name in ALL_ATTENTION_FUNCTIONS else None
    if found is None or (found.disable_in_eval and not decoder.training):
        return None
    return Sharing(found.process_group, by_heads=True)


def require_positions(shared: Sharing | None, given: torch.Tensor | None, cache_length: Any) -> None:
    """Raise `PatchError` where the positions of a part cannot be known: without `position_ids`, or behind cached tokens."""
    if shared is None:
        return
    if given is None:
        raise PatchError(
            "the sequence is shared by several processes and no position_ids came with it, so each would count from 0; pass "
            "position_ids (batch, tokens of this process) that say where the tokens stand in the whole sequence"
        )
    if isinstance(cache_length, torch.Tensor) or cache_length:
        raise PatchError(
            "the sequence is shared by several processes, which cannot decode from a cache; call the model with use_cache=False"
        )


def _gather(group: Any, values: torch.Tensor) -> torch.Tensor:
    """(B, T) of this process -> (B, S) of all, in the order of their ranks."""
    parts = [torch.empty_like(values) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, values.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def windowed_layers(config: Any) -> list[str]:
    """The types of a model's layers that do not see everything.

    >>> from transformers import MistralConfig
    >>> windowed_layers(MistralConfig(sliding_window=8)), windowed_layers(MistralConfig(sliding_window=None))
    (['sliding'], [])
    """
    types = getattr(config, "layer_types", None) or [
        "sliding" if getattr(config, "sliding_window", None) else "full_attention"
    ]
    return sorted({*types} - {"full_attention"})


def take_part(
    shared: Sharing, config: Any, positions: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, Part]:
    """The positions (B, S or T) that attention sees and this process's part, from its positions and 2-D mask, each (B, T).

    Every process of the group must call it. Raises `PatchError` for what the other side would drop: sliding windows, and in a ring
    documents that are packed into one row.
    """
    windowed = windowed_layers(config)
    if windowed:
        raise PatchError(
            f"layers of type {', '.join(windowed)} lose their window where several processes share a "
            "sequence; use a model whose layers all see everything, or one process a sequence"
        )
    if shared.by_heads and config._attn_implementation.endswith("eager"):  # which DeepSpeed leaves without any mask
        raise PatchError(
            "eager attention under DeepSpeed Ulysses would see the future; call model.set_attn_implementation('sdpa') before it is set up"
        )
    whole = _gather(shared.group, positions)
    valid = None if mask is None else _gather(shared.group, mask)
    rises = whole[:, 1:] > whole[:, :-1] if shared.by_heads else positions[:, 1:] > positions[:, :-1]
    broken = bool((rises[:, 1:] & ~rises[:, :-1]).any())
    if valid is not None and not broken:
        broken = bool((valid[:, 1:] > valid[:, :-1]).any())
    if broken and not shared.by_heads:
        raise PatchError(
            "a ring of processes hands on no mask, and a row of this batch is packed from several documents or padded on the left; "
            "give one document a row, padded on the right"
        )
    seen = _mask(whole, valid, getattr(config, "is_causal", True)) if broken else None
    centre = (whole.amin(-1, keepdim=True) + whole.amax(-1, keepdim=True)) // 2
    part = Part(
        distributed.get_rank(shared.group), distributed.get_world_size(shared.group), shared.by_heads, centre, seen
    )
    return whole if shared.by_heads else positions, part


def _mask(positions: torch.Tensor, valid: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """(B, 1, S, S): a token sees those of its own document, which begins where positions do not rise, but for padding."""
    begins = torch.nn.functional.pad(positions[:, 1:] <= positions[:, :-1], (1, 0))
    document = begins.cumsum(-1)
    if valid is not None:
        document = document.masked_fill(valid == 0, -1)
    seen = document[:, None, :, None] == document[:, None, None, :]
    return seen.tril() if causal else seen


def heads_seen(part: Part | None, seen: int, heads: int) -> slice:
    """Which of a layer's `heads` attention is given, where it is given `seen` of them."""
    if seen == heads:
        return slice(None)
    if part is None or not part.by_heads or seen * part.size != heads:
        raise PatchError(
            f"attention was given {seen} of {heads} heads, and which ones cannot be told; shares of heads are known from DeepSpeed "
            "Ulysses alone, not from tensor parallelism"
        )
    return slice(part.rank * seen, (part.rank + 1) * seen)


class ShareOfHeads:
    """A bias scheme as a process with a share of the heads sees it.

    Args:
        scheme: of all heads.
        heads: which of them.
    """

    def __init__(self, scheme: Any, heads: slice) -> None:
        self.scheme = scheme
        self.heads = heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheme, name)

    def formula(self, *arguments: Any) -> torch.Tensor:
        """As the scheme's; one that reads queries has been given those of this share only."""
        bias = self.scheme.formula(*arguments)
        return bias if self.scheme.reads_query else bias[:, self.heads]

    def factors(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As the scheme's."""
        pair = self.scheme.factors(*arguments)
        return None if pair is None else (pair[0][:, self.heads], pair[1])


def refuse_ring(part: Part | None, what: str) -> None:
    """Raise `PatchError` where keys come by in a ring, of which `what` would see those of this process alone."""
    if part is not None and not part.by_heads:
        raise PatchError(
            f"{what} needs all keys at once, and torch's context parallel shows them in turn; use DeepSpeed Ulysses, or a separable bias "
            "such as 'alibi' on sdpa"
        )
