"""What each seam can do on one model class: build it tiny, patch it with one scheme a seam, hold it to the probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

import hfpos
from hfpos.bench import probes
from hfpos.bench.oracle import alibi_logits, nope_logits, rotary_modules
from hfpos.bench.shrink import TRAINED_LENGTH, VOCABULARY, causal_lm_classes, tiny_model


Probe = Callable[[PreTrainedModel, torch.Tensor], str | None]

SEAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "freq": ("yarn", {"factor": 4.0}),
    "bias": ("alibi", {"factor": 4.0}),  # a factor, so that models with ALiBi of their own move too
    "score": ("dynamic", {"factor": 4.0, "cache": "exact"}),
    "embed": ("sinusoidal", {}),
    "nope": ("nope", {}),
}
PROBES: tuple[Probe, ...] = (
    probes.repeatable,
    probes.decoding,
    probes.left_padding,
    probes.generation,
    probes.gradients,
)
LONG = TRAINED_LENGTH + 16
# Rotary positions worked out inside attention, from a table that no module with a telling name owns.
_ROPE_WITHOUT_MODULE = {"codegen", "gptj", "roformer"}


@dataclass
class Cell:
    """What one seam does on one model class: `status` is `works`, `refused` or `fails`; `note` says why or where."""

    status: str
    note: str = ""


@dataclass
class Row:
    """One model class. `problem` says why it could not be built; `skipped` names the probes it fails unpatched."""

    model_type: str
    problem: str = ""
    rope: bool = False
    skipped: list[str] = field(default_factory=list)
    cells: dict[str, Cell] = field(default_factory=dict)


def examine(model_type: str) -> Row:
    """Build the class of `model_type` tiny and try every seam on it."""
    row = Row(model_type)
    model_class = causal_lm_classes()[model_type]
    try:
        model = tiny_model(model_class)
        ids = longest_input(model)
    except Exception as error:  # a class that cannot be built is a row of the report, whatever the reason
        row.problem = first_line(error)
        return row
    row.rope = has_rope(model)
    broken = [probe for probe in PROBES if outcome(probe, model, ids)]
    row.skipped = [probe.__name__ for probe in broken]
    for seam in SEAMS:
        try:
            row.cells[seam] = try_seam(tiny_model(model_class), seam, ids, skip=broken)
        except Exception as error:
            row.cells[seam] = Cell("fails", first_line(error))
    return row


def has_rope(model: PreTrainedModel) -> bool:
    """Whether the unpatched model has rotary positions."""
    return model.config.model_type in _ROPE_WITHOUT_MODULE or bool(rotary_modules(model))


def random_ids() -> torch.Tensor:
    """Token ids (1, LONG), always the same."""
    return torch.randint(4, VOCABULARY, (1, LONG), generator=torch.Generator().manual_seed(1))


def longest_input(model: PreTrainedModel) -> torch.Tensor:
    """Token ids (1, N) past the trained length, or as near to it as a table of positions lets the model go."""
    ids = random_ids()
    for length in (LONG, TRAINED_LENGTH, TRAINED_LENGTH - 2):
        try:
            complaint = probes.finite(model, ids[:, :length])
        except (IndexError, RuntimeError, ValueError) as error:
            complaint = first_line(error)
        if complaint is None:
            return ids[:, :length]
    raise RuntimeError(f"unpatched forward: {complaint}")


def try_seam(model: PreTrainedModel, seam: str, ids: torch.Tensor, skip: Sequence[Probe] = ()) -> Cell:
    """Patch `model` at one seam and hold it to every probe but those in `skip`; `ids` is an input it takes unpatched."""
    scheme, parameters = SEAMS[seam]
    stock, expected = probes.logits(model, ids), _expected(model, seam, ids)
    try:
        hfpos.patch(model, scheme, **parameters)
        refusal = ""
    except hfpos.PatchError as error:
        refusal = first_line(error)
    except Exception as error:
        return Cell("fails", f"patch: {first_line(error)}")
    if not refusal:
        if complaint := _silent(model, seam, ids, stock, expected) or _loud(model, ids, skip):
            return Cell("fails", complaint)
        hfpos.unpatch(model)
    if probes.repeatable not in skip and not torch.equal(probes.logits(model, ids), stock):
        return Cell("fails", "refused, yet the model is changed" if refusal else "unpatch: logits are not bit-equal")
    return Cell("refused", refusal) if refusal else Cell("works")


def _expected(model: PreTrainedModel, seam: str, ids: torch.Tensor) -> torch.Tensor | None:
    """What the scheme of `seam` should give at the first positions of `ids`, from the unpatched model; None where unknown."""
    if seam == "bias":
        return alibi_logits(model, ids, factor=SEAMS["bias"][1]["factor"])
    if seam == "nope":
        return nope_logits(model, ids)
    if seam == "score" and has_rope(model):  # dynamic scaling is the model's own RoPE up to the trained length
        return probes.logits(model, ids[:, :TRAINED_LENGTH])
    return None


def _silent(
    model: PreTrainedModel, seam: str, ids: torch.Tensor, stock: torch.Tensor, expected: torch.Tensor | None
) -> str | None:
    """Where the patched model computes something, but not what it was asked for. Leaves `model` patched as it was."""
    patched = probes.logits(model, ids)
    if not _moves(model, seam, patched, stock):
        return "silent: the logits do not move"
    if seam == "freq" and getattr(model.config, "rope_parameters", None) and model.config.hfpos["stock"]:
        expected = _as_stock_loads_it(model, ids)
    if expected is not None:
        share = probes.difference(patched[:, : expected.shape[1]], expected)
        if share > probes.TOLERANCE:
            return f"silent: off by {share:.1e} of the largest logit from what the scheme should give"
    if seam != "nope":
        try:
            with hfpos.patched(model, "nope", prove=False):
                without = probes.logits(model, ids)
        except hfpos.PatchError:
            return None
        if probes.difference(without, patched) <= probes.TOLERANCE:
            return "silent: the same logits as without any position"
    return None


def _moves(model: PreTrainedModel, seam: str, patched: torch.Tensor, stock: torch.Tensor) -> bool:
    """Whether the patch shows. Where the unpatched model ends at its trained length, unscaled RoPE stands for it beyond."""
    if seam == "score" and has_rope(model) and stock.shape[1] <= TRAINED_LENGTH:
        patched = probes.logits(model, random_ids())
        with hfpos.patched(model, "rope", prove=False):
            stock = probes.logits(model, random_ids())
    return probes.difference(patched, stock) > probes.MOVED


def _as_stock_loads_it(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of an unpatched model of the same weights, built from the rotary parameters of the patched config."""
    names = ("rope_parameters", "max_position_embeddings")
    return probes.logits(tiny_model(type(model), **{name: getattr(model.config, name) for name in names}), ids)


def _loud(model: PreTrainedModel, ids: torch.Tensor, skip: Sequence[Probe]) -> str | None:
    """The first probe that the patched model does not stand."""
    if complaint := outcome(probes.finite, model, random_ids()):
        return f"past the trained length: {complaint}"
    for probe in PROBES:
        if probe not in skip and (complaint := outcome(probe, model, ids)):
            return f"{probe.__name__}: {complaint}"
    return None


def outcome(probe: Probe, model: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """What `probe` complains of, an error it ends in among it; None where it holds."""
    try:
        return probe(model, ids)
    except Exception as error:  # a probe that breaks is a finding, not the end of the sweep
        return first_line(error)


def first_line(error: Exception) -> str:
    """The first line of an error, with its class unless it is ours."""
    text = str(error).strip().split("\n", 1)[0]
    return text if isinstance(error, hfpos.PatchError) else f"{type(error).__name__}: {text}"
