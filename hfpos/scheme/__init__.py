"""What a positional scheme is: `Scheme`, the `Geometry` of the model it meets, and the one exception, `PatchError`.

A scheme is a frozen dataclass of its paper's parameters. It acts at one *seam*, and its module in `hfpos/schemes/` holds
only the mathematics: tensors in, tensors out, no model.

| seam | what the scheme implements |
|---|---|
| `freq` | `frequencies(geometry)`, and `stock(geometry)` where Transformers has a `rope_type` for it |
| `score` | `frequencies_at(geometry, lengths)`: frequencies chosen by the current length; or `branches(geometry, queries, keys)`: other positions for what is far; or `decay(geometry)`; keys are cached unrotated |
| `bias` | `weights(geometry)`, `formula(q_positions, k_positions, weights, query)`, and `factors(...)` where the bias is separable |
| `embed` | `table(positions, width)`, or `resize(weight)` for a learned table |
| `none` | nothing: the model gets no position at all |

Without a model, schemes of the seams `freq`, `bias` and `embed` are building blocks: `Yarn(factor=4, original_length=2048)(q, k, positions)`,
`Alibi(num_heads).bias(q_positions, k_positions)`, `Sinusoidal(dim)(positions)`, and `.module()` where something is learned. Those of the
seam `score` are attention itself: `ReRope(original_length=2048)(query, key, value)`, and `Dynamic(original_length=2048).attend(query, key, value)`.
"""

from hfpos.scheme.base import Scheme
from hfpos.scheme.bias import Bias
from hfpos.scheme.errors import (
    PatchError,
    did_you_mean,
    require_choice,
    require_count,
    require_flag,
    require_length,
    require_number,
)
from hfpos.scheme.geometry import Geometry
from hfpos.scheme.rotary import Rope, RopeScaling


__all__ = [
    "Bias",
    "Geometry",
    "PatchError",
    "Rope",
    "RopeScaling",
    "Scheme",
    "did_you_mean",
    "require_choice",
    "require_count",
    "require_flag",
    "require_length",
    "require_number",
]
