"""T5's relative biases: one learned number for each head and each bucket of distances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import torch

from hfpos.scheme import Bias, Geometry, PatchError, require_flag, require_length


def bucket_starts(buckets: int, max_distance: int) -> list[int]:
    """The smallest distance in each of `buckets` buckets: the first half hold one distance each, the rest grow up to `max_distance`.

    A distance d is in bucket `e + floor((n - e) * log(d / e) / log(max_distance / e))`, n buckets, e of them exact. Solved for d, so
    that no device's logarithm moves a boundary.

    >>> bucket_starts(8, 64)
    [0, 1, 2, 3, 4, 8, 16, 32]
    """
    exact = buckets // 2
    wide = buckets - exact
    almost = 1 - 1e-9  # a boundary that is a whole number must not be rounded up to the next one
    bounds = (exact * (max_distance / exact) ** (k / wide) for k in range(1, wide))
    return [*range(exact + 1), *(math.ceil(almost * bound) for bound in bounds)]


@dataclass(frozen=True, kw_only=True)
class T5(Bias):
    """T5's relative bias: `table[bucket(i - j), h]`, with a learned table that all layers share.

    Paper: Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, arXiv 1910.10683, section 2.1; buckets as
    in Transformers' T5.

    Deviations: the bias is added to the logits after `q . k` has been scaled, in models that scale it; T5 itself does not scale, so
    that a table trained elsewhere may need a factor. The table starts at zero, where T5 draws it at random: the model starts
    without positions and learns them, alike in every run.

    Args:
        num_buckets: rows of the table; >= 2, where `bidirectional` >= 4 and even.
        max_distance: from here on, in tokens, all distances share the last bucket.
        bidirectional: half of the buckets are for keys behind the query; else those are all in bucket 0.
    """

    name = "t5"
    paper = "arXiv 1910.10683"
    summary = "a learned number for each bucket of distances"
    learned = True
    shared = True

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self) -> None:
        require_length(self.name, "max_distance", self.max_distance)
        require_flag(self.name, "bidirectional", self.bidirectional)
        sides, n = (2 if self.bidirectional else 1), self.num_buckets
        if isinstance(n, bool) or not isinstance(n, int) or n < 2 * sides or n % sides:
            expected = "an even whole number >= 4" if self.bidirectional else "a whole number >= 2"
            raise PatchError(f"t5: num_buckets={n!r} is not usable; expected {expected}")
        if self.max_distance <= n // sides // 2:
            raise PatchError(
                f"t5: max_distance={self.max_distance} is not usable; expected more than the {n // sides // 2} distances that have "
                f"a bucket of their own with num_buckets={n}"
            )

    @property
    def two_sided(self) -> bool:
        return self.bidirectional

    def weights(self, geometry: Geometry) -> dict[str, torch.Tensor]:
        """`table` (num_buckets, H), zeros."""
        return {"table": torch.from_numpy(numpy.zeros((self.num_buckets, geometry.heads)))}

    def buckets(self, distance: torch.Tensor) -> torch.Tensor:
        """The bucket (...) of each distance `i - j` (...), int64.

        >>> T5().buckets(torch.tensor([-1, 0, 15, 16, 20, 1000]))
        tensor([ 0,  0, 15, 16, 17, 31])
        """
        sides = 2 if self.bidirectional else 1
        starts = bucket_starts(self.num_buckets // sides, self.max_distance)
        size = distance.abs() if self.bidirectional else distance.clamp(min=0)
        bucket = torch.bucketize(size, torch.tensor(starts[1:], device=distance.device), right=True)
        return bucket + (distance < 0) * (self.num_buckets // 2) if self.bidirectional else bucket

    def formula(
        self,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        weights: dict[str, torch.Tensor],
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bias (B, H, Q, K) of queries at (B, Q) and keys at (B, K) positions, in the dtype of the table.

        >>> table = torch.tensor([[0.5], [1.0], [2.0], [3.0]])
        >>> T5(num_buckets=4).bias(torch.tensor([2]), torch.arange(3), {"table": table})
        tensor([[[2.0000, 1.0000, 0.5000]]])
        """
        buckets = self.buckets(q_positions[:, :, None] - k_positions[:, None, :])
        by_head = weights["table"].T.index_select(
            1, buckets.flatten()
        )  # its backward is 4 times as fast as that of indexing
        return by_head.unflatten(1, buckets.shape).transpose(0, 1)
