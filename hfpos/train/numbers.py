"""The numbers that follow from a recipe: tokens of a micro-batch, a step, the whole run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Numbers:
    """How much is trained on.

    Attributes:
        length: tokens of a sample.
        batch_size: samples of one forward of one process.
        accumulation: forwards of one step.
        replicas: groups of processes that see different samples.
        sequence: processes that share one sequence.
        samples: of one epoch.
        steps: of the whole run.

    >>> numbers = Numbers(length=4096, batch_size=2, accumulation=4, replicas=8, sequence=1, samples=10_000, steps=400)
    >>> numbers.micro_batch_tokens, numbers.step_tokens, numbers.total_tokens
    (8192, 262144, 104857600)
    >>> round(numbers.epochs, 2)
    2.56
    """

    length: int
    batch_size: int
    accumulation: int
    replicas: int
    sequence: int
    samples: int
    steps: int

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens that one process holds in a forward."""
        return self.batch_size * self.length // self.sequence

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step, over all processes."""
        return self.length * self.step_samples

    @property
    def step_samples(self) -> int:
        """Samples of one optimizer step."""
        return self.batch_size * self.accumulation * self.replicas

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.step_tokens * self.steps

    @property
    def epochs(self) -> float:
        """How often each sample is seen."""
        return self.step_samples * self.steps / self.samples

    def lines(self) -> list[str]:
        """The figures with their formulas."""
        part = f" / {self.sequence} processes of a row" if self.sequence > 1 else ""
        return [
            f"tokens of a micro-batch: {self.batch_size} x {self.length:,}{part} = {self.micro_batch_tokens:,}",
            f"tokens of a step: {self.batch_size} x {self.length:,} x {self.accumulation} (accumulation) x {self.replicas} (replicas) "
            f"= {self.step_tokens:,}",
            f"tokens in all: {self.step_tokens:,} x {self.steps:,} steps = {self.total_tokens:,}, {self.epochs:.2f} epochs of "
            f"{self.samples:,} samples",
        ]


def numbers(arguments: TrainingArguments, length: int, samples: int, processes: int, sequence: int) -> Numbers:
    """Work them out as Trainer does.

    Args:
        length: tokens of a sample.
        samples: of one epoch.
        processes: all of them.
        sequence: how many of them share one sequence.

    Raises:
        PatchError: not enough samples for one step.
    """
    batch_size, accumulation = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    replicas = processes // sequence
    together = batch_size * replicas
    batches = samples // together if arguments.dataloader_drop_last else math.ceil(samples / together)
    if not batches:
        raise PatchError(
            f"the data has {samples} samples of {length} tokens, and one forward of all processes takes {together}; give more text, a "
            "shorter data.length, or a smaller training.per_device_train_batch_size"
        )
    an_epoch = math.ceil(batches / accumulation)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * an_epoch)
    return Numbers(length, batch_size, accumulation, replicas, sequence, samples, steps)
