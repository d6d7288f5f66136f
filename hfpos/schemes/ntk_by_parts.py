"""NTK-by-parts: YaRN's frequencies without its temperature."""

from __future__ import annotations

from dataclasses import dataclass

from hfpos.schemes.yarn import YarnRamp


@dataclass(frozen=True, kw_only=True)
class NtkByParts(YarnRamp):
    """NTK-by-parts: high frequencies kept, low ones divided by the factor, a ramp between; no attention temperature.

    Paper: YaRN, arXiv 2309.00071, section 3.2. Deviates: none from the paper's ramp (beta 32 / 1); the "part NTK" class in the
    authors' repository is another method. Stored as stock `yarn` with `attention_factor` 1.
    """

    name = "ntk_by_parts"
    paper = "arXiv 2309.00071 (3.2)"
    summary = "YaRN's frequencies without its temperature"
