"""What optimizers keep and use, by their names in `TrainingArguments.optim`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hfpos.scheme import PatchError, did_you_mean


Temporary = Literal["none", "all", "largest"]
SMALL = 4096  # elements below which bitsandbytes keeps 32 bits


@dataclass(frozen=True)
class OptimizerMemory:
    """The memory of one optimizer.

    Attributes:
        states: tensors of a parameter's shape that are kept; -1 for sums over rows and over columns instead.
        bits: of an element of them; None: as the parameter has.
        paged: they move to main memory when the GPU is full, so they are not counted.
        temporary: copies that a step makes on the way, of all parameters at one time or of the largest.
    """

    states: int
    bits: int | None = None
    paged: bool = False
    temporary: Temporary = "none"

    def kept(self, shape: torch.Size, dtype: torch.dtype, embedding: bool) -> int:
        """Bytes kept for a parameter; Transformers keeps 32 bits for an `embedding` where others have 8."""
        count = shape.numel()
        if self.paged:
            return 0
        if self.states < 0:
            factors = shape[:-1].numel() + shape[:-2].numel() * shape[-1] if len(shape) > 1 else count
            return 4 * factors
        if self.bits is None:
            return self.states * count * dtype.itemsize
        if self.bits == 32 or embedding or count < SMALL:
            return self.states * count * 4
        return self.states * (count + 4 * math.ceil(count / 256))

    def passing(self, sizes: Sequence[int], device: str) -> int:
        """Bytes a step needs on the way, given the bytes of each trained parameter."""
        if self.temporary == "none" or not sizes:
            return 0
        if self.temporary == "all" and device == "cuda":  # torch updates all parameters in one call there
            return sum(sizes)
        return 2 * max(sizes)


_KNOWN = {
    "adamw_torch": OptimizerMemory(2, temporary="all"),
    "adamw_torch_fused": OptimizerMemory(2),
    "adamw_bnb_8bit": OptimizerMemory(2, 8),
    "adamw_8bit": OptimizerMemory(2, 8),
    "paged_adamw_32bit": OptimizerMemory(2, 32, paged=True),
    "paged_adamw_8bit": OptimizerMemory(2, 8, paged=True),
    "lion_32bit": OptimizerMemory(1, 32),
    "lion_8bit": OptimizerMemory(1, 8),
    "paged_lion_32bit": OptimizerMemory(1, 32, paged=True),
    "paged_lion_8bit": OptimizerMemory(1, 8, paged=True),
    "adafactor": OptimizerMemory(-1, temporary="largest"),
    "sgd": OptimizerMemory(0),
}


def optimizer_memory(name: str) -> OptimizerMemory:
    """The memory of the optimizer that `TrainingArguments.optim` calls so.

    Raises:
        PatchError: its memory is not known.

    >>> adam = optimizer_memory("adamw_torch_fused")
    >>> adam.kept(torch.Size([10, 10]), torch.float32, embedding=False)
    800
    """
    if name not in _KNOWN:
        raise PatchError(f"the memory of optimizer {name!r} is not known: {did_you_mean(str(name), _KNOWN)}")
    return _KNOWN[name]
