"""A step of training by `hfpos train` against a step of a plain `transformers.Trainer`: time and peak memory, side by side."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import hfpos
from hfpos.bench.eval import llama
from hfpos.bench.memory import peak_bytes
from hfpos.bench.timing import in_turn, ratio
from hfpos.data.collators import Collator, PoseCollator
from hfpos.train.head import chunk_the_loss
from hfpos.train.trainer import LongContextTrainer


Trainers = Mapping[str, Trainer]
FACTOR = 16  # how much further PoSE's positions reach than its windows


class Clock(TrainerCallback):
    """Times steps from the end of one to the end of the next, so that fetching and collating the batch counts.

    Attributes:
        rounds: the median seconds of a step, of each call of `train`.
        losses: of each call of `train`, the mean over its steps.
    """

    def __init__(self) -> None:
        self.rounds: list[float] = []
        self.losses: list[float] = []
        self._ends: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the steps of the call before."""
        self._ends = [time.perf_counter()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sum up the call."""
        steps = [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)]
        self.rounds.append(statistics.median(steps))
        self.losses.append(state.log_history[-1]["train_loss"])


def step(
    tokens: int = 8192,
    make: Callable[[], LlamaForCausalLM] = lambda: llama(32_000, 8192),
    rounds: int = 3,
    steps: int = 1,
    bf16: bool = False,
) -> dict[str, Any]:
    """Ours against plain: the same model, batch of one row, optimizer, and gradient checkpointing.

    The peak is what a step needs beyond the weights and AdamW's moments, which both have in memory before: activations, logits and
    gradients.

    Args:
        tokens: of the row.
        make: the model, with the same weights each time.
        rounds: of `steps` timed steps each, the two Trainers in turn.
        bf16: compute in bfloat16 (autocast).
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(folder, steps, batch=1, bf16=bf16)
        models = {"plain": make(), "hfpos": make()}
        rows = _rows(1, tokens, models["plain"].config.vocab_size)
        loss = chunk_the_loss(models["hfpos"])
        common = {"args": arguments, "train_dataset": rows, "data_collator": Collator()}
        trainers: Trainers = {
            "plain": Trainer(model=models["plain"], **common),
            "hfpos": LongContextTrainer(measure=None, model=models["hfpos"], **common),
        }
        clocks = timed(trainers, rounds)
        peaks = {name: peak_bytes(trainer.train, arguments.device) for name, trainer in trainers.items()}
    seconds = {name: clock.rounds for name, clock in clocks.items()}
    losses = {name: clock.losses[0] for name, clock in clocks.items()}
    return {
        "tokens": tokens,
        "vocabulary": models["plain"].config.vocab_size,
        "parameters": models["plain"].num_parameters(),
        "loss_of_hfpos": loss.reason,
        "loss_relative_difference": abs(losses["hfpos"] / losses["plain"] - 1),
        "peak_memory_over_plain": round(peaks["hfpos"] / peaks["plain"], 3),
        "tokens_a_second_over_plain": round(ratio(seconds, "plain", "hfpos"), 3),
        "plain_megabytes": round(peaks["plain"] / 1e6),
        "hfpos_megabytes": round(peaks["hfpos"] / 1e6),
        "hfpos_tokens_a_second": round(tokens / statistics.median(seconds["hfpos"])),
    }


def pose(window: int = 256, batch: int = 4, rounds: int = 5, steps: int = 4, model: Any = llama) -> dict[str, Any]:
    """PoSE to 16 times the window against plain positions, on the same model patched for the longer context.

    Args:
        window: tokens of a sample.
        batch: samples of a step.
        rounds: of `steps` timed steps each, in turn.
        model: makes a model for a vocabulary and a length.
    """
    target = FACTOR * window
    models = {name: _long(model(2048, window)) for name in ("plain", "pose")}
    vocabulary = models["plain"].config.vocab_size
    collators = {"plain": Collator(), "pose": PoseCollator(target)}
    with tempfile.TemporaryDirectory() as folder:
        trainers: Trainers = {
            name: LongContextTrainer(
                measure=None,
                model=models[name],
                args=_arguments(folder, steps, batch),
                train_dataset=_rows(batch * steps, window, vocabulary),
                data_collator=collator,
            )
            for name, collator in collators.items()
        }
        clocks = timed(trainers, rounds)
    seconds = {name: clock.rounds for name, clock in clocks.items()}
    return {
        "window": window,
        "target": target,
        "batch": batch,
        "time_over_plain": round(ratio(seconds, "pose", "plain"), 3),
        "plain_milliseconds": round(1e3 * statistics.median(seconds["plain"]), 1),
    }


def timed(trainers: Trainers, rounds: int) -> dict[str, Clock]:
    """Let each train in turn, so many rounds after one to warm up; the clocks hold those rounds."""
    clocks = {name: Clock() for name in trainers}
    for name, trainer in trainers.items():
        trainer.add_callback(clocks[name])
    in_turn({name: trainer.train for name, trainer in trainers.items()}, rounds)
    for clock in clocks.values():
        clock.rounds = clock.rounds[1:]
    return clocks


def _long(model: LlamaForCausalLM) -> LlamaForCausalLM:
    hfpos.patch(model, "yarn", factor=FACTOR)
    chunk_the_loss(model)
    return model


def _arguments(folder: str | Path, steps: int, batch: int, bf16: bool = False) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
    )


def _rows(count: int, tokens: int, vocabulary: int) -> Any:
    """Random tokens, the same each time: neither time nor memory depends on what they are."""
    ids = torch.randint(0, vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]
