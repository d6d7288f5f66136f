"""The numbers of a model that schemes depend on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """The numbers of a model that a scheme may depend on (lengths in tokens, sizes in elements).

    Attributes:
        heads: attention (query) heads of one layer.
        head_dim: width of one head.
        rotary_dim: how many of a head's dimensions are rotated; equals `head_dim` unless the model rotates a part.
        theta: base of the unscaled rotary frequencies `theta ** (-2 i / rotary_dim)`.
        trained_length: context length of the pretraining, None where the model does not state one.
        trained_length_stated: whether the config names it (`original_max_position_embeddings`) or it is read off
            `max_position_embeddings` of an unscaled model, which somebody may have raised.
        allowed_length: the longest input the model's config allows (`max_position_embeddings`), None if unbounded.
        length_problem: why `trained_length` cannot be told from the config, None if it can.
    """

    heads: int
    head_dim: int
    rotary_dim: int
    theta: float
    trained_length: int | None
    allowed_length: int | None
    trained_length_stated: bool = False
    length_problem: str | None = None
