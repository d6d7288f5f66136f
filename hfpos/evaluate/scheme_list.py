"""The schemes of a comparison, as a user writes them: `none,linear,yarn(beta_fast=16)`."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from hfpos.scheme import PatchError, Scheme
from hfpos.schemes import REGISTRY
from hfpos.schemes._nested import name_and_parameters


REFERENCE = "none"
HOW_FAR = {"factor", "target_length", "group_size"}  # parameters that say how far a scheme extends


@dataclass(frozen=True)
class Entry:
    """One scheme of a comparison; `scheme` None is the model as it was loaded."""

    label: str
    scheme: Scheme | None


def entries(schemes: str | list[str | Scheme], factor: float | None, trained: int | None, longest: int) -> list[Entry]:
    """The schemes to compare, the unpatched model first.

    Args:
        schemes: names with or without parameters, separated by commas, or a list of such names and of scheme objects.
        factor: how far to extend, for every scheme that has to be told (so not for `alibi`, whose own default is 1); longest / trained unless
            given. A scheme that takes a target length instead gets `factor` times the trained length.
        trained: the model's trained length in tokens, None where it is not stated.
        longest: the longest length that is measured, in tokens.

    Raises:
        PatchError: an unknown scheme or parameter, a scheme given twice, something that cannot be read.

    >>> [entry.label for entry in entries("yarn(beta_fast=16),alibi", 4, 2048, 8192)]
    ['none', 'yarn(beta_fast=16)', 'alibi']
    >>> str(entries("yarn", None, 2048, 8192)[1].scheme)
    'yarn(factor=4.0)'
    """
    if factor is None and trained is not None and longest > trained:
        factor = longest / trained
    given = _split(schemes) if isinstance(schemes, str) else list(schemes)
    found = [Entry(REFERENCE, None)]
    for each in given:
        if each == REFERENCE:
            continue
        if isinstance(each, Scheme):
            found.append(Entry(str(each), each))
        else:
            found.append(Entry(each.replace(" ", ""), _scheme(each, factor, trained)))
    labels = [entry.label for entry in found]
    for label in labels:
        if labels.count(label) > 1:
            raise PatchError(f"{label} is given twice; name each scheme once, or with other parameters")
    return found


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts = [part.strip() for part in re.split(r",(?![^(]*\))(?![^\[]*\])", text)]
    if not all(parts):
        raise PatchError(f"schemes={text!r}: expected names separated by commas, e.g. none,linear,yarn(beta_fast=16)")
    return parts


def _scheme(text: str, factor: float | None, trained: int | None) -> Scheme:
    name, parameters = name_and_parameters(text)
    cls = REGISTRY[name]
    open_fields = {field.name for field in dataclasses.fields(cls) if field.default in (None, dataclasses.MISSING)}
    if factor is not None and not HOW_FAR & parameters.keys():
        if "factor" in open_fields:
            parameters["factor"] = factor
        elif "target_length" in open_fields and trained is not None:
            parameters["target_length"] = round(factor * trained)
    return cls.create(**parameters)
