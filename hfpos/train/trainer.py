"""Transformers' Trainer, measuring at long context; it stops where training makes no sense and keeps the last whole checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from accelerate import skip_first_batches
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from hfpos.train.measure import Measure


class LongContextTrainer(Trainer):
    """A Trainer whose evaluation is the recipe's.

    Args:
        measure: what to evaluate; None for nothing.
        options: of `transformers.Trainer`.
    """

    def __init__(self, *, measure: Measure | None, **options: Any) -> None:
        # Trainer asks only whether there is something to evaluate on
        super().__init__(eval_dataset=None if measure is None else measure.documents.documents, **options)
        self.measure = measure
        parallelism: Any = getattr(self.accelerator, "parallelism_config", None)
        self.shares_rows = parallelism is not None and parallelism.sp_enabled
        # Trainer takes a mean over each forward here; this one counts the tokens of the whole step
        if self.shares_rows:
            self.model_accepts_loss_kwargs = True

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As Trainer's; where processes share rows, a run goes on in the middle of an epoch, too."""
        if not self.shares_rows:
            return super().train(*arguments, **options)
        transformers.trainer.skip_first_batches = _read_on
        try:
            return super().train(*arguments, **options)
        finally:
            transformers.trainer.skip_first_batches = skip_first_batches

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the model as the recipe says; the names of the metrics are those of `Measure.metrics`, with the prefix."""
        if self.measure is None or eval_dataset is not None or ignore_keys:
            raise PatchError(
                "this trainer evaluates what the recipe's evaluation: says, nothing else; use hfpos.evaluate for the rest"
            )
        found = self.measure.metrics(cast(nn.Module, self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As Trainer's; a loss that is not a finite number stops the run before it reaches the weights."""
        ids = inputs["input_ids"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.shares_rows:
            loss = loss * self.get_sp_size()  # Trainer logs the mean over processes, and each has a part of the rows
        if not torch.isfinite(loss):
            raise PatchError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}, on {self._name_samples(ids)}; the weights are those "
                "before this step. Look at these samples, lower training.learning_rate, or train in bfloat16 instead of float16"
            )
        return loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As Trainer's; where processes share rows, the labels of the whole step are counted over all of them."""
        batches, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.shares_rows and batches:
            mine = sum(batch["shift_labels"].ne(-100).sum() for batch in batches)
            labels = self.accelerator.gather(mine.to(device)).sum()
        return batches, labels

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As Trainer's; where processes share rows, this process's share of the mean over all tokens of the step.

        DeepSpeed adds gradients up over the processes of a row and takes the mean over the others. Trainer's own way there gathers the
        losses first, whose backward pass adds the gradients up once more: they come out multiplied by the processes of a row.
        """
        if not self.shares_rows:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = model(**inputs, labels=inputs["shift_labels"], num_items_in_batch=num_items_in_batch)
        loss = outputs.loss * (self.accelerator.num_processes // self.get_sp_size())
        return (loss, outputs) if return_outputs else loss

    def _name_samples(self, ids: torch.Tensor) -> str:
        """Where the rows of a batch come from, found by their first tokens: cheap enough for an error."""
        dataset: Any = self.train_dataset
        rows = [row.tolist() for row in ids.cpu()]
        names = []
        for index in range(len(dataset)):
            sample = dataset[index]["input_ids"].tolist()
            if any(_holds(sample, row) for row in rows):
                names.append(dataset.where(index))
            if len(names) == len(rows):
                break
        return "; ".join(names) or "samples that are not in the data"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's; half a checkpoint is taken away, and earlier ones stay."""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            folder = Path(str(self.args.output_dir))
            shutil.rmtree(folder / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            raise PatchError(
                f"the checkpoint of step {self.state.global_step} could not be written to {folder} ({type(error).__name__}: {error}); "
                "earlier checkpoints are intact: free some room, and give the same command again"
            ) from error


def _read_on(loader: Any, batches: int) -> Any:
    """What accelerate's `skip_first_batches` cannot do with DeepSpeed's loader of shared rows."""
    for _ in range(batches):
        next(loader)
    return loader


def _holds(sample: list[int], row: list[int]) -> bool:
    """Whether `row` is the sample, or the part of it that this process has."""
    return any(sample[at : at + len(row)] == row for at in range(0, len(sample), len(row)))
