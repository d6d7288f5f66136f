"""What each scheme of the registry does on one model: patched into it one after the other, held to the probes, saved and loaded."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

import hfpos
from hfpos.bench import probes
from hfpos.bench.examine import Cell, Probe, Row, first_line, longest_input, outcome, random_ids
from hfpos.bench.examples import PLAIN, all_examples
from hfpos.bench.models import build
from hfpos.families import family_of


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hfpos.scheme import Scheme

PROBES: tuple[Probe, ...] = (
    probes.finite,
    probes.decoding,
    probes.left_padding,
    probes.right_padding,
    probes.gradients,
)
# What hfpos promises of a patched model, whatever the unpatched one does
PROMISED = (probes.finite, probes.left_padding, probes.right_padding)


def examine_all(name: str) -> Row:
    """Try every scheme on the model `name` of `hfpos.bench.models`."""
    row = Row(name)
    try:
        model = build(name)
        ids = longest_input(model)
    except Exception as error:  # a model that cannot be built is a row of the report, whatever the reason
        row.problem = first_line(error)
        return row
    broken = [probe for probe in PROBES if probe not in PROMISED and outcome(probe, model, ids)]
    row.skipped = [probe.__name__ for probe in broken]
    for label, scheme in examples_for(model).items():
        try:
            row.cells[label] = try_scheme(model, scheme, ids, skip=broken)
        except Exception as error:
            row.cells[label] = Cell("fails", first_line(error))
        if row.cells[label].status == "fails":
            model = build(name)  # what failed may have left its marks
    return row


def examples_for(model: PreTrainedModel) -> dict[str, Scheme]:
    """Every scheme with parameters that suit the model, or a usual one where it is of no known family."""
    geometry = PLAIN
    with contextlib.suppress(hfpos.PatchError):
        geometry = family_of(model).geometry()
    return all_examples(geometry, model.config.get_text_config(decoder=True).num_hidden_layers)


def try_scheme(model: PreTrainedModel, scheme: Scheme, ids: torch.Tensor, skip: Sequence[Probe] = ()) -> Cell:
    """Patch `model` and hold it to every probe but those in `skip`; it comes out unpatched. `ids` is an input it takes unpatched."""
    stock, names = probes.logits(model, ids), {name for name, _ in model.named_parameters()}
    reach, own = _past_the_end(model), _own_scheme(model)
    try:
        hfpos.patch(model, scheme)
    except hfpos.PatchError as error:
        changed = not torch.equal(probes.logits(model, ids), stock)
        return Cell("fails", "refused, yet the model is changed") if changed else Cell("refused", first_line(error))
    # the model's own scheme may change nothing, where hfpos says that it has shown no change
    same = scheme.name == own and not hfpos.describe(model).proved
    complaint = _moves(model, ids, stock, reach, same)
    if complaint is None:
        _learn(model, names)
        complaint = _holds(model, ids, skip) or _reloads(model)
    hfpos.unpatch(model)
    if complaint is None and not torch.equal(probes.logits(model, ids), stock):
        complaint = "unpatch: logits are not bit-equal"
    return Cell("fails", complaint) if complaint else Cell("works")


def _past_the_end(model: PreTrainedModel) -> torch.Tensor | None:
    """The logits past the trained length; None where the model does not go there."""
    try:
        return probes.logits(model, random_ids())
    except (IndexError, RuntimeError, ValueError):
        return None


def _own_scheme(model: PreTrainedModel) -> str | None:
    try:
        return hfpos.describe(model).scheme
    except hfpos.PatchError:
        return None


def _moves(
    model: PreTrainedModel, ids: torch.Tensor, stock: torch.Tensor, reach: torch.Tensor | None, same: bool
) -> str | None:
    """A complaint where the patched model computes what it did before. One that goes further than before may do so up to there."""
    moved = probes.difference(probes.logits(model, ids), stock)
    if same:
        return None if moved <= probes.TOLERANCE else f"off by {moved:.1e} of the largest logit from the same scheme"
    if moved > probes.MOVED:
        return None
    try:
        further = probes.logits(model, random_ids())
    except (IndexError, RuntimeError, ValueError):
        return "silent: the logits do not move"
    gained = further.isfinite().all() if reach is None else probes.difference(further, reach) > probes.MOVED
    return None if gained else "silent: the logits do not move"


def _learn(model: PreTrainedModel, known: set[str]) -> None:
    """Other weights for what the scheme brought: what they start from is often zero, which would hide that they got lost."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name not in known:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))


def _holds(model: PreTrainedModel, ids: torch.Tensor, skip: Sequence[Probe]) -> str | None:
    for probe in PROBES:
        if probe not in skip and (complaint := outcome(probe, model, ids)):
            return f"{probe.__name__}: {complaint}"
    return None


def _reloads(model: PreTrainedModel) -> str | None:
    """Saved and loaded again, past the trained length; by Transformers too where `describe` says that it does."""
    expected = probes.logits(model, random_ids())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaders: dict[str, Callable[..., PreTrainedModel]] = {"hfpos.from_pretrained": hfpos.from_pretrained}
        if hfpos.describe(model).stock_loadable:
            loaders[type(model).__name__] = type(model).from_pretrained
        for name, load in loaders.items():
            share = probes.difference(probes.logits(load(folder).eval(), random_ids()), expected)
            if share > probes.TOLERANCE:
                return f"saved and loaded by {name}: off by {share:.1e} of the largest logit"
    return None
