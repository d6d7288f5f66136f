"""Which schemes a family can take, by the seam that they act at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpos.families._directions import refuse_both_ways, refuse_one_way
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from hfpos.families._family import Family
    from hfpos.scheme import Scheme


def check_seam(family: Family, scheme: Scheme) -> None:
    """Raise `PatchError` where `family` does not offer the seam of `scheme`, or where attention does not look the way that the scheme does."""
    if scheme.seam not in family.seams:
        raise PatchError(
            f"{scheme.name!r} acts at the {scheme.seam!r} seam; {family.name} ({type(family.model).__name__}) offers only: "
            f"{', '.join(family.seams)}"
        )
    if scheme.seam in ("bias", "score") and not family.reaches_attention():
        raise PatchError(
            f"{scheme.name!r} acts inside attention, and {type(family.model).__name__} does not use Transformers' attention interface; use "
            f"{family.outside_attention}"
        )
    if scheme.seam == "score" and family.bidirectional():
        refuse_both_ways(scheme, family.model)
    if getattr(scheme, "needs_both_ways", False) and not family.bidirectional():
        refuse_one_way(scheme, family.model)
