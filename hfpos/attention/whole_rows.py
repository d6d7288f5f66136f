"""What attention that goes in blocks of queries and keys cannot honour."""

from __future__ import annotations

from typing import Any

from hfpos.scheme import PatchError


# What an attention function may be given and what does not fit a block.
OF_WHOLE_ROWS = ("position_bias", "cache")


def refuse_whole_rows(scheme: str, module: Any, options: dict[str, Any]) -> None:
    """Raise `PatchError` where a model hands to attention, among its `options`, what holds for all queries or keys at once."""
    for name in OF_WHOLE_ROWS:
        if options.get(name) is not None:
            raise PatchError(
                f"{type(module).__name__} hands {name!r} to attention, which {scheme!r} computes for a few keys at a time; use a scheme of the "
                "freq seam"
            )
