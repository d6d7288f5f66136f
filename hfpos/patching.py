"""`patch`, `unpatch`, `patched`: resolve -> plan -> check everything -> apply -> prove -> record."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import PreTrainedModel

from hfpos.families import family_of
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
        tokenizer: its `model_max_length` follows the patched length.
        prove: run the probe.
        backend: the attention implementation that a scheme of the bias or score seam stands on: `auto`, `sdpa`, `flex`,
            `flash_attention_2` or `eager`. `auto` keeps the model's own, and for sdpa takes whatever is fastest on the device at hand; it
            never changes the mathematics. `describe` says what is used, and why.

    Raises:
        PatchError: unknown scheme or parameter, a pair of scheme and model that makes no sense, conflicting lengths, a compiled
            model, or a patch that did not move the logits.

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
        _patch(model, target, chosen, tokenizer, prove, backend)
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
        model, scheme, parameters: as for `patch`.
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


def refuse_compiled(model: nn.Module) -> None:
    compiled = any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules()
    )
    if compiled:
        raise PatchError(
            "the model is compiled, and compiled code would go on with the old positions; patch first, then torch.compile the patched model"
        )


def _patch(
    model: nn.Module, target: PreTrainedModel, scheme: Scheme, tokenizer: Any, prove: bool, backend: str
) -> None:
    family = family_of(target)
    plan = family.plan(scheme, model, tokenizer, backend)
    record = Record(scheme, plan, family.geometry(), family.name)
    proving = prove and can_run(target) and not family.is_unchanged(scheme, record.geometry)
    before = None
    if proving:
        before = _probe(family, family.probe_positions(record.geometry))
        reference = family.unscaled_reference(scheme)
        if reference is not None:
            _prove_rotation(family_of(target), reference, model)
    _apply(target, record)
    if before is None:
        return
    try:
        _prove(family, record, before)
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


def can_run(model: nn.Module) -> bool:
    """Whether a forward would work here and now: weights are there and whole, not on meta and not in shards."""
    if hasattr(model, "hf_device_map"):
        return True
    return not any(
        weight.is_meta or hasattr(weight, "placements") or hasattr(weight, "ds_id") for weight in model.parameters()
    )


@torch.no_grad()
def _probe(family: Family, positions: list[int] | None) -> torch.Tensor:
    """The logits (8, vocabulary) of eight tokens, float32, without a trace: modes and remembered lengths are put back."""
    model: Any = family.model
    with without_trace(family):
        embedding = model.get_input_embeddings()
        device = embedding.weight.device if not embedding.weight.is_meta else torch.device("cpu")
        ids = torch.arange(8, device=device)[None] * 7 % embedding.weight.shape[0]
        given = {} if positions is None else {"position_ids": torch.tensor([positions], device=device)}
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given)[0][0].float().cpu()


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the model in eval mode; every module gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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


@contextlib.contextmanager
def without_trace(family: Family) -> Iterator[None]:
    """Run the model in eval mode and leave it as it was: its modes, and what its modules remember from call to call."""
    states = [(module, dict(module.__dict__)) for module in family.stateful_modules()]
    with eval_mode(family.model):
        try:
            for module, attributes in states:
                module._buffers = copy.deepcopy(attributes["_buffers"])
            yield
        finally:
            for module, attributes in states:
                module.__dict__.clear()
                module.__dict__.update(attributes)


def afresh(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Run a model that finds nothing of earlier calls afterwards: stock rotary embeddings that follow the length remember the longest."""
    try:
        return without_trace(family_of(language_model(model)))
    except PatchError:
        return contextlib.nullcontext()  # not a family hfpos knows


def _prove_rotation(family: Family, reference: Scheme, root: nn.Module) -> None:
    """Show that the rotation which attention is to take over is the family's own, in every layer."""
    near = list(range(8))
    expected = _probe(family, near)
    plan = family.plan(reference, root)
    plan.apply()
    try:
        found = _probe(family, near)
    finally:
        plan.undo()
    tolerance = 0.05 if family.model.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if (found - expected).abs().max() > tolerance * expected.abs().max():
        raise PatchError(
            f"{type(family.model).__name__} rotates queries and keys in a way that the score seam does not reproduce; use a scheme of "
            "the freq seam, e.g. cache='pinned' with a target_length"
        )


def _prove(family: Family, record: Record, before: torch.Tensor) -> None:
    try:
        after = _probe(family, family.probe_positions(record.geometry))
    except PatchError:
        raise
    except Exception as error:
        raise PatchError(
            f"{type(family.model).__name__} does not run with {record.scheme} ({type(error).__name__}: {error}); the model was left as it was"
        ) from error
    if not torch.isfinite(after).all():
        raise PatchError(
            f"{record.scheme} gives logits that are not finite on {type(family.model).__name__}; the model was left as it was"
        )
    grows = hasattr(record.scheme, "resize")  # a longer table may keep its trained rows, which the probe looks at
    if torch.equal(before, after) and not grows:
        raise PatchError(
            f"{record.scheme} did not change the logits of {type(family.model).__name__} at positions beyond its trained length; the "
            "model was left as it was. If these parameters are meant to change nothing, pass prove=False"
        )
