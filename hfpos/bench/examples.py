"""Each scheme with parameters that suit a given model, found by the names of its fields: no scheme is listed here.

A new scheme needs nothing in this file as long as its fields have defaults, or names that are known in `_OPEN`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from hfpos.bench.shrink import TRAINED_LENGTH
from hfpos.scheme import Geometry, PatchError
from hfpos.schemes import REGISTRY


if TYPE_CHECKING:
    from collections.abc import Callable

    from hfpos.scheme import Scheme

FACTOR = 4.0
CACHES = ("exact", "pinned")
# Of a field without a default, or with None for one, by its name: from the numbers of the model and how many layers it has.
_OPEN: dict[str, Callable[[Geometry, int], Any]] = {
    "factor": lambda model, layers: FACTOR,
    "target_length": lambda model, layers: round(FACTOR * _length(model)),
    # within what the sliding windows of tiny models show, where nothing would change else
    "window": lambda model, layers: _length(model) // 8,
    "local": lambda model, layers: _length(model) // 8,
    "short_factor": lambda model, layers: _divisors(model, 0.1),
    "long_factor": lambda model, layers: _divisors(model, 0.5),
    "schemes": lambda model, layers: ["nope" if layer % 2 else "rope" for layer in range(layers)],
    "encoder": lambda model, layers: "rope",
    "decoder": lambda model, layers: "alibi",
}
PLAIN = Geometry(
    heads=4,
    head_dim=16,
    rotary_dim=16,
    theta=10_000.0,
    trained_length=TRAINED_LENGTH,
    allowed_length=TRAINED_LENGTH,
)


def all_examples(geometry: Geometry = PLAIN, layers: int = 2) -> dict[str, Scheme]:
    """Every registered scheme with parameters for a model of this geometry, by name; with both ways to cache where it has them.

    >>> str(all_examples()["yarn"]), str(all_examples()["dynamic, pinned"])
    ('yarn(factor=4.0)', "dynamic(factor=4.0, cache='pinned')")
    """
    found = {}
    for name, cls in REGISTRY.as_dict().items():
        found[name] = example(cls, geometry, layers)
        if getattr(found[name], "cache", None) in CACHES:
            for cache in CACHES:
                found[f"{name}, {cache}"] = example(cls, geometry, layers, cache=cache)
            del found[name]
    return found


def example(cls: type[Scheme], geometry: Geometry = PLAIN, layers: int = 2, **given: Any) -> Scheme:
    """The scheme `cls` with parameters that extend a model of this geometry to four times its length, where it can be told so.

    Args:
        given: parameters that are known.

    Raises:
        PatchError: a required field that no rule here knows.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name in given or (name == "target_length" and "factor" in fields):
            continue
        if name == "original_length" and geometry.trained_length is None:
            given[name] = TRAINED_LENGTH
        elif name == "factor" and field.default == 1:
            given[name] = FACTOR  # at 1 a model's own ALiBi would stay as it is
        elif name == "theta" and field.default is not None:
            given[name] = 10 * geometry.theta  # a model's own might be the default
        elif name in _OPEN and (required or field.default is None):
            given[name] = _OPEN[name](geometry, layers)
        elif required:
            raise PatchError(
                f"{cls.name}: no rule gives an example of its required field {name!r}; give the field a default, or add it to {__name__}"
            )
    return cls.create(**given)


def _length(geometry: Geometry) -> int:
    return geometry.trained_length or TRAINED_LENGTH


def _divisors(geometry: Geometry, step: float) -> list[float]:
    return [1 + step * pair for pair in range(geometry.rotary_dim // 2)]
