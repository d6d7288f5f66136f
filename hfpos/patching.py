"""`patch`, `unpatch`, `patched`: resolve -> plan -> check everything -> apply -> prove -> record."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedModel

from hfpos.families import family_of
from hfpos.families._layers import in_layers
from hfpos.probe import can_run, probe, without_trace
from hfpos.proof import prove_patch, prove_rotation
from hfpos.scheme import Geometry, PatchError, Scheme
from hfpos.schemes import REGISTRY


if TYPE_CHECKING:
    from torch import nn

    from hfpos.families._family import Family
    from hfpos.plan import Plan

M = TypeVar("M", bound="nn.Module")
RECORD = "hfpos_record"


@dataclass
class Record:
    """What is known of a patched model; kept on the model itself.

    Attributes:
        scheme: what was put in.
        plan: the edits that did it.
        geometry: the numbers of the unpatched model.
        family: the name of its family.
        proved: whether a probe showed that the logits moved (not run on the meta device, on sharded weights, with `prove=False`, or
            where the parameters leave the model as it is).
    """

    scheme: Scheme
    plan: Plan
    geometry: Geometry
    family: str
    proved: bool = False


def patch(
    model: M,
    scheme: str | Scheme,
    *,
    layers: str | Iterable[int] | Iterable[bool] | None = None,
    tokenizer: Any = None,
    prove: bool = True,
    backend: str = "auto",
    **parameters: Any,
) -> M:
    """Put a positional scheme into a live model, in place, and return the same model.

    Everything is checked before the first edit; if anything fails the model is left as it was. A model that is patched already gets
    the new scheme instead of the old one, never on top of it. Afterwards a short probe beyond the trained length must move the logits.

    Args:
        model: a Transformers model, bare or wrapped by PEFT, DDP and the like; on any device, also meta.
        scheme: a name from `hfpos.schemes()` with its `parameters` as keywords, or a scheme object, e.g. `Yarn(factor=4)`.
        layers: the layers that get the scheme, the others stay as they are: indices, one True or False for each layer, or a type of layer
            such as `"full_attention"` (`config.layer_types`). Unless given: all layers; where a model has rotary embeddings of its own for
            each type of layer, a rotary scheme goes into those with full attention. The scheme `per_layer` gives several layers different ones.
        tokenizer: its `model_max_length` follows the patched length.
        prove: run the probe.
        backend: the attention implementation that a scheme of the bias or score seam stands on: `auto`, `sdpa`, `flex`,
            `flash_attention_2` or `eager`. `auto` keeps the model's own, and for sdpa takes whatever is fastest on the device at hand; it
            never changes the mathematics. `describe` says what is used, and why.

    Raises:
        PatchError: unknown scheme or parameter, a pair of scheme and model that makes no sense, conflicting lengths, layers that the model
            does not have or that do not take the scheme, a compiled model, or a patch that did not move the logits.

    >>> import hfpos, transformers
    >>> config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=64,
    ...                                   intermediate_size=32, max_position_embeddings=128)
    >>> model = hfpos.patch(transformers.LlamaForCausalLM(config), "yarn", factor=4)
    >>> model.config.max_position_embeddings
    512
    >>> hfpos.unpatch(model).config.max_position_embeddings
    128
    """
    chosen = _resolve(scheme, parameters)
    target = language_model(model)
    refuse_compiled(model)
    previous = record_of(target)
    if previous is not None:
        _undo(target, previous)
    try:
        family = family_of(target)
        with _naming(chosen, family):
            if layers is not None:
                chosen = in_layers(chosen, layers, family)
            _patch(model, family, chosen, tokenizer, prove, backend)
    except BaseException:
        if previous is not None:
            _apply(target, previous)
        raise
    return model


def unpatch(model: M) -> M:
    """Take the scheme out again: logits, buffers, config, methods and module identities are the original's. Returns the model.

    Raises:
        PatchError: the model is not patched.
    """
    target = language_model(model)
    record = record_of(target)
    if record is None:
        raise PatchError(
            f"{type(target).__name__} is not patched, there is nothing to take out; hfpos.describe(model) shows its state"
        )
    _undo(target, record)
    return model


@contextlib.contextmanager
def patched(model: M, scheme: str | Scheme, **parameters: Any) -> Iterator[M]:
    """Patch for the length of a `with` block; whatever happens in it, the model comes out as it went in, patched or not.

    Args:
        model, scheme, parameters: as for `patch`, `layers` and the like among the parameters.
    """
    target = language_model(model)
    before = record_of(target)
    patch(model, scheme, **parameters)
    try:
        yield model
    finally:
        inside = record_of(target)
        if inside is not None:
            _undo(target, inside)
        if before is not None:
            _apply(target, before)


def language_model(model: nn.Module) -> PreTrainedModel:
    """The Transformers model itself, or the one inside a wrapper."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else []
    found = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise PatchError(
            f"found no Transformers model in {type(model).__name__}; expected a PreTrainedModel or a wrapper around one"
        )
    return found


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The Transformers model in `model`. Raises `PatchError` where it has no language modelling head."""
    language = language_model(model)
    if language.get_output_embeddings() is None:
        raise PatchError(
            f"{type(language).__name__} has no language modelling head; load it with AutoModelForCausalLM"
        )
    return language


def record_of(target: PreTrainedModel) -> Record | None:
    """The record of a patched model, None where it is not patched."""
    return target.__dict__.get(RECORD)


def _resolve(scheme: str | Scheme, parameters: dict[str, Any]) -> Scheme:
    if isinstance(scheme, Scheme):
        if parameters:
            raise PatchError(
                f"{scheme} was given as an object and {', '.join(sorted(parameters))} beside it; put the parameters into the object"
            )
        return scheme
    if not isinstance(scheme, str):
        raise PatchError(f"scheme is a {type(scheme).__name__}; expected a name such as 'yarn' or a scheme object")
    return REGISTRY[scheme].create(**parameters)


@contextlib.contextmanager
def _naming(scheme: Scheme, family: Family) -> Iterator[None]:
    """Let the message of every `PatchError` say which scheme met which model."""
    try:
        yield
    except PatchError as error:
        model = type(family.model).__name__
        words = set(re.findall(r"\w+", str(error)))
        if scheme.name not in words or not words & {model, family.name}:
            error.args = (f"{error} ({scheme.name} on {model}, family {family.name})",)
        raise


def refuse_compiled(model: nn.Module) -> None:
    compiled = any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()
    )
    if compiled:
        raise PatchError(
            "the model is compiled, and compiled code would go on with the old positions; patch first, then torch.compile the patched model"
        )


def _patch(model: nn.Module, family: Family, scheme: Scheme, tokenizer: Any, prove: bool, backend: str) -> None:
    target = family.model
    plan = family.plan(scheme, model, tokenizer, backend)
    record = Record(scheme, plan, family.geometry(), family.name)
    proving = prove and can_run(target) and not family.is_unchanged(scheme, record.geometry)
    before = None
    if proving:
        before = probe(family, family.probe_positions(record.geometry))
        reference = family.unscaled_reference(scheme)
        if reference is not None:
            prove_rotation(family_of(target), reference, model)
    _apply(target, record)
    if before is None:
        return
    try:
        prove_patch(family, record, before)
    except BaseException:
        _undo(target, record)
        raise
    record.proved = True


def _apply(target: PreTrainedModel, record: Record) -> None:
    record.plan.apply()
    setattr(target, RECORD, record)


def _undo(target: PreTrainedModel, record: Record) -> None:
    record.plan.undo()
    delattr(target, RECORD)


@contextlib.contextmanager
def instead(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Let an instance have another method, `name`, for a while."""
    own = module.__dict__.get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)


def afresh(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Run a model that finds nothing of earlier calls afterwards: stock rotary embeddings that follow the length remember the longest."""
    try:
        return without_trace(family_of(language_model(model)))
    except PatchError:
        return contextlib.nullcontext()  # not a family hfpos knows
