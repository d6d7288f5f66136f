"""How a model rotates, found by looking: one short forward, in which every attention runs with its rotation and without it.

Where the function that rotates stands, what it is called, in which layers it is called and which dimensions it turns is each family's own
business; queries before and after say it all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfpos.attention.interface import patched_backend
from hfpos.attention.seam import Seam
from hfpos.configuration import own_copy
from hfpos.families._directions import attention_modules
from hfpos.families._rotary_module import fix, frequency_names
from hfpos.families._rotary_tables import LayerTable, MoreTables, Twice
from hfpos.plan import Hook, Plan
from hfpos.positions import PositionHook
from hfpos.rotation import CONVENTIONS, cos_sin, rotate
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from hfpos.families._rotary import RotaryDecoder
    from hfpos.plan import Edit

POSITIONS = list(range(8))


class _Queries(Seam):
    """Keeps the queries (1, H, Q, D) that each layer's attention gets, and leaves attention as it is."""

    backends = ("sdpa", "eager")
    absolute = False

    def __init__(self) -> None:
        self.of_layer: dict[int, list[torch.Tensor]] = {}

    def act(self, module: Any, query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """As stock, once the query is kept."""
        key, value, mask, _ = arguments
        self.of_layer.setdefault(module.layer_idx, []).append(query.detach().float().cpu())
        inner = options.pop("inner")
        ours = ("call", "backend")
        return inner(module, query, key, value, mask, **{name: options[name] for name in options if name not in ours})


def measure_rotation(family: RotaryDecoder, run: Callable[[list[int]], Any]) -> tuple[str, frozenset[int]]:
    """The convention by which `family` rotates, and the layers in which it does; both by its unscaled frequencies.

    Args:
        family: of a model that can be run; unpatched.
        run: runs it at some positions, without a cache and without a trace.

    Raises:
        PatchError: what the queries become is no rotation of them by these frequencies, or not the same in all layers.
    """
    turned, unturned = _Queries(), _Queries()
    _, config, copied = own_copy(family.model, family.model.config, family.config)
    config._attn_implementation = patched_backend(family.backend(), turned.backends)
    rotary, still = (family.build_unscaled(config, family.layer_type) for _ in range(2))
    names = frequency_names(rotary)
    frequencies = {name: getattr(rotary, name).clone() for name in names}
    rotary = fix(rotary, frequencies, dict.fromkeys(names, 1.0))
    still = fix(still, {name: torch.zeros_like(each) for name, each in frequencies.items()}, dict.fromkeys(names, 1.0))
    rotary.config = still.config = config
    edits: list[Edit] = [*copied, *family.swap(rotary)]
    edits.append(Hook(rotary, "register_forward_hook", MoreTables([still]), {"with_kwargs": True}))
    edits += family.hook_edits(PositionHook(family.decoder, **family.position_options() | {"seam": turned}))
    # an attention that moves to the interface with this plan is the innermost module that knows its layer
    for module in attention_modules(family.decoder) or _innermost(family.decoder):
        again = Twice(LayerTable(1), unturned)
        edits.append(Hook(module, "register_forward_pre_hook", again.before, {"with_kwargs": True}))
        edits.append(Hook(module, "register_forward_hook", again.after))
        edits.append(Hook(module, "register_forward_pre_hook", LayerTable(0), {"with_kwargs": True}))
    plan = Plan(tuple(edits))
    plan.apply()
    try:
        run(POSITIONS)
    finally:
        plan.undo()
    queries = {
        layer: (torch.cat(found), torch.cat(unturned.of_layer[layer])) for layer, found in turned.of_layer.items()
    }
    return _read(family, queries, frequencies[family.buffer])


def _innermost(decoder: nn.Module) -> list[nn.Module]:
    """The modules that know which layer they are of and hold no other such: attention, and not the layer around it."""
    known = [module for module in decoder.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    return [module for module in known if not any(child in known for child in module.modules() if child is not module)]


def _read(
    family: RotaryDecoder, queries: dict[int, tuple[torch.Tensor, torch.Tensor]], inv_freq: torch.Tensor
) -> tuple[str, frozenset[int]]:
    kinds = getattr(family.config, "layer_types", None) if family.layer_type else None
    cos, sin = cos_sin(torch.tensor(POSITIONS), inv_freq.float())
    found: dict[str, list[int]] = {}
    for layer, (turned, still) in queries.items():
        if torch.equal(turned, still) or (kinds and kinds[layer] != family.layer_type):
            continue
        tolerance = (1e-4 if family.model.dtype == torch.float32 else 3e-2) * still.abs().max()
        fits = (
            name
            for name in CONVENTIONS
            if 2 * len(inv_freq) <= still.shape[-1]
            and (rotate(still, cos, sin, name) - turned).abs().max() <= tolerance
        )
        found.setdefault(next(fits, "neither"), []).append(layer)
    if len(found) != 1 or "neither" in found:
        raise PatchError(
            f"{type(family.model).__name__} ({family.name}) does something else to its queries than rotating them by its frequencies"
            f"{', and not the same in all layers' if len(found) > 1 else ''}; the score seam cannot take that over. Use a scheme of the freq seam, "
            "e.g. cache='pinned' with a target_length"
        )
    ((convention, layers),) = found.items()
    return convention, frozenset(layers)
