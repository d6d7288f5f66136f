"""For decoders with rotary embeddings: a scheme of its own in each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hfpos.families._layers import layer_types
from hfpos.families._rotary_module import check_obeys, fix, frequency_names, scaling_name
from hfpos.families._rotary_tables import LayerTable, MoreTables
from hfpos.plan import Hook
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpos.attention.seam import Seam
    from hfpos.families._rotary import RotaryDecoder
    from hfpos.plan import Edit
    from hfpos.scheme import Scheme


class LayeredRotary:
    """Works out which table of cos and sin and which seam each layer gets. Table 0 is the model's own.

    Args:
        family: of the model.
        schemes: of each layer, None where it keeps its own.
        config: the patched model's copy.
    """

    def __init__(self, family: RotaryDecoder, schemes: Sequence[Scheme | None], config: Any) -> None:
        if family.length_dependent():
            raise PatchError(
                f"per_layer: the rotary embeddings of {type(family.model).__name__} follow the length of the call ({family.native()}), which only "
                "all layers can do together; patch the whole model first, e.g. with a pinned scheme, save and load it"
            )
        self.family = family
        self.config = config
        own = family.build(config)
        self.own = {
            name: (getattr(own, name).clone(), getattr(own, scaling_name(name))) for name in frequency_names(own)
        }
        self.changes: list[dict[str, tuple[torch.Tensor, float]]] = [{}]
        self.tables: list[int] = []
        self.seams: list[Seam | None] = []
        made: dict[tuple[int, str | None], tuple[int, Seam | None]] = {}
        for scheme, kind in zip(schemes, layer_types(family.config), strict=True):
            known = (schemes.index(scheme), kind if family.layer_type else None)
            if known not in made:
                made[known] = (0, None) if scheme is None else self._make(scheme, kind)
            table, seam = made[known]
            self.tables.append(table)
            self.seams.append(seam)

    @property
    def changed(self) -> list[int]:
        """The layers that are not as they were."""
        return [
            index for index, (table, seam) in enumerate(zip(self.tables, self.seams, strict=True)) if table or seam
        ]

    def edits(self) -> list[Edit]:
        """What puts the tables into the model."""
        first, *others = (self._rotary(changes) for changes in self.changes)
        edits = self.family.swap(first)
        for other in others:
            check_obeys(other, type(self.family.rotary).__name__)
        edits.append(Hook(first, "register_forward_hook", MoreTables(others), {"with_kwargs": True}))
        for module in self.family.decoder.modules():
            index = getattr(module, "layer_idx", None)
            if isinstance(index, int):
                choose = LayerTable(self.tables[index])
                edits.append(Hook(module, "register_forward_pre_hook", choose, {"with_kwargs": True}))
        return edits

    def _make(self, scheme: Any, kind: str) -> tuple[int, Seam | None]:
        """The table and the seam of layers of type `kind` under `scheme`."""
        family = self.family
        geometry, buffer = family.geometry_of(kind), family.buffer_of(kind)
        scheme.check(geometry)
        if scheme.seam == "score" and family.layer_type not in (None, kind):
            raise PatchError(
                f"{scheme.name!r} goes into the layers of type {family.layer_type!r} of {type(family.model).__name__} only, not into those of type "
                f"{kind!r}; leave them out of layers=, or use a scheme of the freq seam"
            )
        own, scale = self.own[buffer]
        wanted = torch.zeros_like(own), 1.0
        if scheme.seam == "freq":
            family.check_unscaled(self.config, geometry, kind)
            frequencies, factor = scheme.frequencies(geometry)
            wanted = frequencies.float(), factor
            if wanted[1] == scale and torch.allclose(wanted[0], own, rtol=1e-6, atol=0):
                return 0, None
        self.changes.append({buffer: wanted})
        return len(self.changes) - 1, family.layer_seam(scheme, geometry) if scheme.seam != "freq" else None

    def _rotary(self, changes: dict[str, tuple[torch.Tensor, float]]) -> Any:
        rotary = self.family.build(self.config)
        rotary.config = self.config  # by which it is known as the decoder's own
        chosen = self.own | changes
        return fix(
            rotary,
            {name: values for name, (values, _) in chosen.items()},
            {name: scale for name, (_, scale) in chosen.items()},
        )
