"""xPos."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hfpos.constant import exact
from hfpos.rotation import inverse_frequencies
from hfpos.scheme import Geometry, Scheme, require_number
from hfpos.schemes._alone import Alone


@dataclass(frozen=True, kw_only=True)
class XPos(Alone, Scheme):
    """xPos: rotary embeddings whose pairs of dimensions count the less the farther away a key is.

    Pair i of R / 2 adds `zeta_i ** ((p_q - p_k) / scale_base) * <R(p_q f_i) q, R(p_k f_i) k>` to the logit, with
    `zeta_i = (2 i / R + 0.4) / 1.4` and the frequencies `f` of the model. The decay is taken from where the query stands, so it is
    finite at any length and in any dtype. Causal attention only. A model that was pretrained without the decay needs training.

    Paper: LeX, arXiv 2212.10554. The authors' code (torchscale) centres powers on the middle of the text, which cancels in the logits.

    Args:
        scale_base: how many tokens away a pair has decayed to `zeta_i`; 512 in the paper, 2048 in NeMo.

    >>> model = Geometry(heads=8, head_dim=4, rotary_dim=4, theta=10000.0, trained_length=512, allowed_length=512)
    >>> XPos().decay(model) ** 512
    tensor([0.2857, 0.6429], dtype=torch.float64)
    >>> query, key, value = torch.ones(3, 1, 2, 5, 4).unbind()
    >>> XPos()(query, key, value).shape
    torch.Size([1, 2, 5, 4])
    """

    name = "xpos"
    paper = "arXiv 2212.10554"
    summary = "rotary embeddings whose dimensions decay with the distance"

    __call__ = Alone.attend

    scale_base: float = 512

    def __post_init__(self) -> None:
        require_number(self.name, "scale_base", self.scale_base, least=0, strictly=True)

    @property
    def seam(self) -> str:
        return "score"

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        """`(inv_freq, attention_scale)`: (rotary_dim / 2,) float64 radians per token, and 1."""
        return inverse_frequencies(geometry.theta, geometry.rotary_dim), 1.0

    def decay(self, geometry: Geometry) -> torch.Tensor:
        """What each pair of dimensions is multiplied by for every token of distance: (rotary_dim / 2,) float64."""
        dims = geometry.rotary_dim
        return exact([((2 * i / dims + 0.4) / 1.4) ** (1 / self.scale_base) for i in range(dims // 2)])

    def reach(self, geometry: Geometry) -> int:
        """Tokens over which no pair decays by more than a factor of 16, one at least."""
        return max(int(math.log(16) / -self.decay(geometry).log().min().item()), 1)
