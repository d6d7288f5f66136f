"""Which way a model's attention looks, and what a scheme means where it looks both ways."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import TYPE_CHECKING, Any

from hfpos.scheme import Bias, PatchError


if TYPE_CHECKING:
    from torch import nn


def attention_modules(decoder: nn.Module) -> list[Any]:
    """The modules that call Transformers' attention interface, in order."""
    return [module for module in decoder.modules() if _names_interface(type(module).forward)]


@functools.cache  # a model has hundreds of modules of few classes
def _names_interface(forward: Any) -> bool:
    forward = inspect.unwrap(forward)
    return inspect.isfunction(forward) and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def calls_interface(decoder: nn.Module) -> bool:
    """Whether attention goes through Transformers' attention interface, which is where a bias or a late rotation gets in."""
    return bool(attention_modules(decoder))


def looks_both_ways(decoder: Any) -> bool:
    """Whether tokens see those behind them: no attention in it says that it is causal, and it is no decoder.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    >>> [looks_both_ways(BertModel(BertConfig(**sizes, is_decoder=flag))) for flag in (False, True)]
    [True, False]
    """
    if getattr(decoder.config, "is_decoder", False):
        return False
    flags = [getattr(module, "is_causal", None) for module in attention_modules(decoder)]
    return bool(flags) and all(flag is False for flag in flags)


def both_ways(scheme: Bias, model: Any) -> Bias:
    """`scheme` as attention in both directions takes it: a form of `alibi` or `t5` for that is chosen without being asked for.

    Raises:
        PatchError: the scheme says nothing of keys behind the query.
    """
    found = _two_sided(scheme)
    if found is None:
        raise PatchError(
            f"{scheme.name!r} says nothing of keys behind the query, which {type(model).__name__} attends to; what works there: {_works()}"
        )
    return found


def refuse_both_ways(scheme: Any, model: Any) -> None:
    """Raise `PatchError` for a scheme of the score seam: it goes by what a token has seen, which has no end where it sees both ways."""
    raise PatchError(
        f"{scheme.name!r} goes by how many tokens stand before the query, and {type(model).__name__} attends to those behind it too; what "
        f"works there: {_works()}"
    )


def refuse_one_way(scheme: Any, model: Any) -> None:
    """Raise `PatchError` for a scheme some of whose heads see only keys behind the query, which a causal mask hides."""
    raise PatchError(
        f"{scheme} has heads that see only what stands behind the query, and {type(model).__name__} is causal; use another form of "
        f"{scheme.name!r}, or give each stack its own: encoder_decoder(encoder=..., decoder=...)"
    )


def _two_sided(scheme: Bias) -> Bias | None:
    if not scheme.two_sided and any(field.name == "bidirectional" for field in dataclasses.fields(scheme)):
        scheme = dataclasses.replace(scheme, bidirectional=True)  # type: ignore[call-arg]
    return scheme if scheme.two_sided else None


def _works() -> str:
    from hfpos.schemes import REGISTRY  # all of them, of which some import this package's neighbours

    biases = [name for name, cls in REGISTRY.as_dict().items() if issubclass(cls, Bias) and _two_sided(cls())]
    return (
        f"{', '.join(biases)}, rotations with fixed frequencies (rope, linear, ntk, yarn, or dynamic with cache='pinned' and a factor), "
        "sinusoidal, learned, nope"
    )
