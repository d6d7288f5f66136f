"""The proof of a patch: that the model runs with the scheme, and that its logits moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hfpos.attention.layered import listed
from hfpos.layer_proof import idle_layers
from hfpos.probe import probe
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from torch import nn

    from hfpos.families._family import Family
    from hfpos.patching import Record
    from hfpos.scheme import Scheme


def prove_rotation(family: Family, reference: Scheme, root: nn.Module) -> None:
    """Show that the rotation which attention is to take over is the family's own, in every layer."""
    near = list(range(8))
    expected = probe(family, near)
    plan = family.plan(reference, root)
    plan.apply()
    try:
        found = probe(family, near)
    finally:
        plan.undo()
    tolerance = 0.05 if family.model.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if (found - expected).abs().max() > tolerance * expected.abs().max():
        raise PatchError(
            f"{type(family.model).__name__} rotates queries and keys in a way that the score seam does not reproduce; use a scheme of "
            "the freq seam, e.g. cache='pinned' with a target_length"
        )


def prove_patch(family: Family, record: Record, before: torch.Tensor) -> None:
    """Show that the patched model runs, that the scheme reaches every layer it is for, and that the logits moved.

    Args:
        before: the logits of the probe in the unpatched model.
    """
    try:
        after = probe(family, family.probe_positions(record.geometry))
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
    layers = family.changed_layers()
    idle = idle_layers(family.decoder, layers, lambda: probe(family, family.probe_positions(record.geometry)))
    if idle:
        raise PatchError(
            f"layer{'s' if len(idle) > 1 else ''} {listed(idle)} of {type(family.model).__name__} ({family.name}) did not change under "
            f"{record.scheme}: {'they do' if len(idle) > 1 else 'it does'} not rotate queries and keys, or have that scheme already; leave "
            f"{'them' if len(idle) > 1 else 'it'} out of layers= (None in per_layer)"
        )
    grows = family.resizes(record.scheme)  # a longer table may keep its trained rows, which the probe looks at
    if torch.equal(before, after) and not grows and not layers:
        raise PatchError(
            f"{record.scheme} did not change the logits of {type(family.model).__name__} at positions beyond its trained length; the "
            "model was left as it was. If these parameters are meant to change nothing, pass prove=False"
        )
