"""Which layers get a scheme: what a user says with `layers=`, and the scheme of every layer that follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hfpos.scheme import PatchError
from hfpos.schemes.per_layer import PerLayer


if TYPE_CHECKING:
    from hfpos.families._family import Family
    from hfpos.scheme import Scheme


def layer_types(config: Any) -> list[str]:
    """The type of each layer, where the config tells; else all are of the same."""
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None)
    return list(types) if types and len(types) == count else ["full_attention"] * count


def in_layers(scheme: Scheme, layers: Any, family: Family) -> Scheme:
    """`scheme` in some of the model's layers only: a `PerLayer`, or the scheme itself where those are all that it would be put into.

    Args:
        layers: indices, one True or False for each layer, or a type of layer (`config.layer_types`).

    Raises:
        PatchError: no such layers, or a scheme that cannot be in some of them.
    """
    if isinstance(scheme, PerLayer):
        raise PatchError(
            "per_layer says which layer gets what already; give layers= with the scheme that those layers get, not both"
        )
    types = layer_types(family.config)
    chosen = chosen_layers(layers, types)
    if chosen == family.default_layers(scheme):
        return scheme
    return PerLayer(schemes=[scheme if index in chosen else None for index in range(len(types))])


def chosen_layers(layers: Any, types: list[str]) -> list[int]:
    """The indices of the layers that `layers` means, in order.

    >>> chosen_layers([True, False, True], ["full_attention"] * 3)
    [0, 2]
    >>> chosen_layers("sliding_attention", ["full_attention", "sliding_attention"])
    [1]
    """
    count, layers = len(types), _plain(layers)
    if isinstance(layers, str):
        if layers not in types:
            known = ", ".join(map(repr, sorted(set(types))))
            raise PatchError(f"layers={layers!r} is not a type of layer of this model; its types are {known}")
        return [index for index, kind in enumerate(types) if kind == layers]
    if not isinstance(layers, Iterable) or isinstance(layers, Mapping):
        raise PatchError(
            f"layers={layers!r} is not usable; expected a list of indices, a list of one True or False for each layer, or a type of layer"
        )
    given = [_plain(each) for each in layers]
    if given and all(isinstance(each, bool) for each in given):
        if len(given) != count:
            raise PatchError(f"layers= has {len(given)} entries of True and False, the model has {count} layers")
        chosen = [index for index, each in enumerate(given) if each]
    else:
        wrong = [
            each for each in given if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < count
        ]
        if wrong:
            raise PatchError(
                f"layers={_brief(given)}: {wrong[0]!r} is no layer of this model; expected indices from 0 to {count - 1}"
            )
        chosen = sorted(set(given))
        if len(chosen) < len(given):
            raise PatchError(f"layers={_brief(given)} names a layer twice")
    if not chosen:
        raise PatchError("layers= names no layer, so nothing would change; leave it out for all layers")
    return chosen


def _plain(value: Any) -> Any:
    """Numbers of Python in the place of those of numpy and torch."""
    return value.tolist() if hasattr(value, "tolist") else value


def _brief(values: list[Any]) -> str:
    text = str(values)
    return text if len(text) <= 60 else text[:57] + "..."
