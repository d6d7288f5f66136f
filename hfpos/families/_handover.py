"""For layers that take keyword arguments and do not hand them on to their attention (StableLM, Nemotron)."""

from __future__ import annotations

import dis
import functools
import inspect
from typing import TYPE_CHECKING, Any

from hfpos.families._directions import attention_modules
from hfpos.plan import Hook


if TYPE_CHECKING:
    from torch import nn

    from hfpos.plan import Edit


def take(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of such a layer: the `Call` goes along with the position ids, which the layer does hand on.

    An argument, not state: what gradient checkpointing keeps to compute the layer anew.
    """
    if kwargs.get("hfpos") is None or "position_ids" not in kwargs:
        return None
    return args, kwargs | {"position_ids": (kwargs["position_ids"], kwargs["hfpos"])}


def give(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of its attention: takes the two apart."""
    both = kwargs.get("position_ids")
    return (args, kwargs | {"position_ids": both[0], "hfpos": both[1]}) if isinstance(both, tuple) else None


def handover_edits(decoder: nn.Module) -> list[Edit]:
    """The edits that let the `Call` past every layer of `decoder` that would drop it."""
    attentions = [module for module in attention_modules(decoder) if reads_keywords(type(module))]
    edits: list[Edit] = []
    for layer in decoder.modules():
        if reads_keywords(type(layer)) is not False:
            continue
        for attention in (child for child in layer.children() if any(child is each for each in attentions)):
            edits.append(Hook(layer, "register_forward_pre_hook", take, {"with_kwargs": True}))
            edits.append(Hook(attention, "register_forward_pre_hook", give, {"with_kwargs": True}))
    return edits


def reads_keywords(module_class: type[nn.Module]) -> bool | None:
    """Whether the forward of a class does anything with its `**kwargs`; None where it takes none.

    >>> from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    >>> from transformers.models.stablelm.modeling_stablelm import StableLmDecoderLayer
    >>> reads_keywords(LlamaDecoderLayer), reads_keywords(StableLmDecoderLayer)
    (True, False)
    """
    return _reads_keywords(inspect.unwrap(module_class.forward))


@functools.cache  # a model has hundreds of modules of few classes, and reading code takes its time
def _reads_keywords(forward: Any) -> bool | None:
    code = getattr(forward, "__code__", None)
    if code is None or not code.co_flags & inspect.CO_VARKEYWORDS:
        return None
    name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)]
    loads = (each.argval for each in dis.get_instructions(code) if each.opname.startswith("LOAD"))
    return any(name == each or (isinstance(each, tuple) and name in each) for each in loads)
