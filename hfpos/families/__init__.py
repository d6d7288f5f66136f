"""How a model lets positions in; `hfpos.families()` lists the families.

Most decoders fit `rotary`, found by structure, not by name. A model type that differs has a file of its own here and overrides only
what differs; a family's `refuses` decides, and the most particular one wins.
"""

import sys

from transformers import PreTrainedModel

from hfpos.families._family import Family
from hfpos.registry import CallablePackage, Registry
from hfpos.scheme import PatchError


REGISTRY: Registry[type[Family]] = Registry("family")
REGISTRY.discover(__name__, Family)


sys.modules[__name__].__class__ = CallablePackage


def family_of(model: PreTrainedModel) -> Family:
    """The family that `model` belongs to; `PatchError` with the reason where there is none."""
    candidates = sorted(REGISTRY.as_dict().values(), key=lambda family: -family.priority)
    reasons = []
    for family in candidates:
        reason = family.refuses(model)
        if reason is None:
            return family(model)
        if not reason.startswith("it is not a"):  # families of one kind of model say no more than that
            reasons.append(f"{family.name}: {reason}")
    known = ", ".join(sorted(family.name for family in candidates))
    raise PatchError(
        f"{type(model).__name__} fits no family ({'; '.join(reasons)}), so hfpos cannot patch it; the families are {known}"
    )
