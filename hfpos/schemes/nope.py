"""No positional encoding."""

from __future__ import annotations

from dataclasses import dataclass

from hfpos.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Nope(Scheme):
    """No positional encoding (NoPE): the model's own positions are switched off; only the causal mask tells order.

    Paper: The Impact of Positional Encoding on Length Generalization, arXiv 2305.19466.
    """

    name = "nope"
    paper = "arXiv 2305.19466"
    summary = "no positions at all; the causal mask alone tells order"

    @property
    def seam(self) -> str:
        return "none"
