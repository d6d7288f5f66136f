"""A training run from its recipe to the trained model: `hfpos train`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed

from hfpos.data.collators import Collator, PoseCollator, RandomPositionCollator
from hfpos.data.training_set import Source, TrainingSet, training_set
from hfpos.evaluate.processes import device, from_main, gather, is_main
from hfpos.report.provenance import provenance
from hfpos.scheme import PatchError
from hfpos.train.announce import announce, memory_estimate
from hfpos.train.arguments import training_arguments, wants_fsdp
from hfpos.train.callbacks import NewPositions, Report
from hfpos.train.folder import RunFolder
from hfpos.train.head import chunk_the_loss
from hfpos.train.holdings import Layout
from hfpos.train.measure import Measure
from hfpos.train.model import load, put_together
from hfpos.train.numbers import numbers
from hfpos.train.parallel import layout_of, processes_of_a_sequence, set_up
from hfpos.train.planning import less_memory, training_value
from hfpos.train.recipe import Recipe
from hfpos.train.trainer import LongContextTrainer


def run(recipe: Recipe) -> dict[str, Any]:
    """Train as the recipe says, and return what `run.json` in its folder says.

    The folder then holds `recipe.yaml` (defaults included), `run.json` (numbers, versions, hardware, perplexities) and the model in `model`.
    A run that was killed goes on from its last checkpoint when the same recipe is run again.

    Raises:
        PatchError: a recipe that makes no sense, a folder that is taken, memory that runs out, a loss that is not finite.
    """
    arguments = training_arguments(recipe)
    folder = RunFolder(str(arguments.output_dir))
    from_main(lambda: folder.begin(recipe))
    try:
        with _memory(recipe, Layout(), arguments.device):
            return _run(recipe, arguments, folder)
    finally:
        folder.end()


def _run(recipe: Recipe, arguments: TrainingArguments, folder: RunFolder) -> dict[str, Any]:
    console = Console(quiet=not is_main(), highlight=False, soft_wrap=True)
    checkpoint = folder.newest_checkpoint()
    results = folder.read_results()
    model, tokenizer = load(recipe)
    measure = None
    if recipe.evaluation is not None:
        measure = Measure(recipe.evaluation, tokenizer, str(recipe.model.path))
        _baseline(recipe, arguments, measure, model, results)
        # with a checkpoint at hand this was measured before it was written
        arguments.eval_on_start = checkpoint is None
    # Trainer does so later, when LoRA and what a scheme learns have drawn their first weights
    set_seed(arguments.seed)
    model = put_together(recipe, model, tokenizer)
    data, collator = _data(recipe, tokenizer), _collator(recipe)
    report = Report(console, measure, results)
    callbacks: list[Any] = [report]
    if recipe.data.positions is not None:
        callbacks.append(NewPositions(collator))
    if recipe.evaluation is not None and recipe.evaluation.patience is not None:
        callbacks.append(EarlyStoppingCallback(recipe.evaluation.patience))
    with _refused():
        trainer = LongContextTrainer(
            measure=measure,
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=collator,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    engine = set_up(recipe, model, trainer.accelerator)
    sequence = processes_of_a_sequence(trainer.accelerator)
    collator.counted = sequence > 1
    figures = numbers(arguments, recipe.data.length, len(data), trainer.accelerator.num_processes, sequence)
    memory = memory_estimate(recipe, model, trainer.accelerator) if is_main() else None
    loss = chunk_the_loss(model)
    if sequence > 1 and not loss.chunked:
        raise PatchError(
            f"processes that share a row count its tokens through the chunked loss, which this model does without: {loss.reason}"
        )
    results |= {**provenance(), "engine": engine, "data": data.summary(), "loss": loss.reason, "memory": memory}
    results["numbers"] = {
        name: getattr(figures, name) for name in ("micro_batch_tokens", "step_tokens", "steps", "total_tokens")
    }
    results["baseline"] = None if measure is None else measure.baseline
    if is_main():
        folder.write_results(results)
    announce(console, recipe, model, figures, results, checkpoint)
    with _memory(recipe, layout_of(trainer.accelerator), arguments.device):
        trained = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    results["train"] = trained.metrics
    results["best_checkpoint"] = trainer.state.best_model_checkpoint
    if measure is not None:
        results["after"] = _final(trainer, measure, report)
    _save(trainer, folder)
    if is_main():
        folder.write_results(results)
    console.print(f"The model: {folder.model}. All numbers: {folder.path / 'run.json'}")
    return results


def passes(results: dict[str, Any]) -> bool:
    """Whether the trained model passed the recipe's short-context gate, if it has one."""
    return math.isfinite((results.get("after") or {}).get("score", 0.0))


def _baseline(
    recipe: Recipe, arguments: TrainingArguments, measure: Measure, model: Any, results: dict[str, Any]
) -> None:
    """Measure the unpatched model, or take from a killed run what was measured then."""
    if not measure.section.baseline or recipe.model.config is not None or _will_shard(arguments):
        return
    known = {int(length): value for length, value in (results.get("baseline") or {}).items()}
    if not (known or recipe.model.quantization):
        model = model.to(device())
    measure.measure_baseline(model, known)


def _will_shard(arguments: TrainingArguments) -> bool:
    """Whether weights are about to be divided among processes; then no process holds a whole model."""
    plugin = getattr(arguments, "deepspeed_plugin", None)
    return bool(arguments.fsdp) or wants_fsdp() or (plugin is not None and plugin.zero_stage == 3)


def _data(recipe: Recipe, tokenizer: Any) -> TrainingSet:
    section = recipe.data
    return training_set(
        [Source(**source.model_dump()) for source in section.sources],
        tokenizer,
        length=section.length,
        packing=section.packing,
        seed=section.seed,
        cache_dir=section.cache_dir,
        skip_bad=section.skip_bad,
    )


def _collator(recipe: Recipe) -> Collator:
    positions = recipe.data.positions
    if positions is None:
        return Collator()
    if positions.kind == "pose":
        return PoseCollator(positions.target_length, chunks=positions.chunks, seed=positions.seed)
    return RandomPositionCollator(positions.target_length, seed=positions.seed)


def _final(trainer: Any, measure: Measure, report: Report) -> dict[str, float]:
    """The metrics of the model that is about to be saved."""
    state, evaluations = trainer.state, report.results["evaluations"]
    if evaluations and evaluations[-1]["step"] == state.global_step and not trainer.args.load_best_model_at_end:
        return {name: value for name, value in evaluations[-1].items() if name != "step"}
    found = measure.metrics(trainer.model)
    report.show("trained", found)
    return found


def _save(trainer: LongContextTrainer, folder: RunFolder) -> None:
    """Write the model beside its place first, so that `model` is whole or not there."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    beside = folder.path / ".model.part"
    error = None
    try:
        trainer.save_model(str(beside))
    except (OSError, RuntimeError) as found:
        error = PatchError(
            f"the model could not be written to {beside} ({found}); free some room, and give the same command again"
        )
    gather([], error, trainer.accelerator.num_processes)
    if is_main():
        beside.replace(folder.model)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """What Trainer refuses, in one line."""
    try:
        yield
    except (ValueError, RuntimeError, ImportError) as error:
        raise PatchError(f"training: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def _memory(recipe: Recipe, layout: Layout, device: Any) -> Iterator[None]:
    """An out-of-memory error says what to change."""
    try:
        yield
    except PatchError:
        raise
    except Exception as error:
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)):
            raise
        tried = f"{training_value(recipe, 'per_device_train_batch_size')} samples a forward"
        changes = "; ".join(less_memory(recipe, layout, device))
        raise PatchError(
            f"out of memory at data.length={recipe.data.length} with {tried}; {changes or 'take a shorter data.length'} "
            "(`hfpos plan` with the same recipe says where memory goes)"
        ) from error
