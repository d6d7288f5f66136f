"""Which schemes and data an engine of several processes computes as a single process would; all else is refused before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from accelerate.utils import DistributedType

from hfpos.attention.sequence_parallel import windowed_layers
from hfpos.patching import causal_model, language_model, record_of
from hfpos.scheme import PatchError
from hfpos.train.holdings import Layout


if TYPE_CHECKING:
    from accelerate import Accelerator

    from hfpos.train.recipe import Recipe


def set_up(recipe: Recipe, model: Any, accelerator: Accelerator) -> str:
    """Check the recipe against the engine, tell the engine which attention the model has, and return the engine's name.

    Raises:
        PatchError: together they would not compute what a single process does.
    """
    parallelism: Any = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.cp_enabled:
        _check_ring(recipe, model, accelerator, parallelism)
    if parallelism is not None and parallelism.sp_enabled:
        _check_ulysses(recipe, model, parallelism)
        # accelerate's own check of this name knows no other implementations than Transformers' own
        parallelism.sp_handler.sp_attn_implementation = causal_model(model).config._attn_implementation
    if is_sharded(accelerator):
        _check_shards(recipe, model, accelerator)
    return name_of(accelerator)


def name_of(accelerator: Accelerator) -> str:
    """In words, for the record.

    >>> from accelerate import Accelerator
    >>> name_of(Accelerator(cpu=True))
    'one process'
    """
    kinds = {
        DistributedType.NO: "one process",
        DistributedType.FSDP: "FSDP",
        DistributedType.DEEPSPEED: "DeepSpeed",
    }
    name = kinds.get(accelerator.distributed_type, "DDP")
    if name == "FSDP":
        name += str(accelerator.state.fsdp_plugin.fsdp_version)
    if name == "DeepSpeed":
        name += f" ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    parallelism: Any = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.cp_enabled:
        name += f", context parallel {parallelism.cp_size}"
    if parallelism is not None and parallelism.sp_enabled:
        name += f", Ulysses {parallelism.sp_size}"
    return name if accelerator.num_processes == 1 else f"{name}, {accelerator.num_processes} processes"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process will hold a part of the weights only."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def layout_of(accelerator: Accelerator) -> Layout:
    """How a step is laid out over the processes."""
    shards: Literal["none", "gradients", "all"] = "all" if is_sharded(accelerator) else "none"
    if shards == "none" and accelerator.distributed_type == DistributedType.DEEPSPEED:
        shards = "gradients" if accelerator.state.deepspeed_plugin.zero_stage else "none"
    sequence = processes_of_a_sequence(accelerator)
    return Layout(accelerator.num_processes, accelerator.num_processes // sequence, sequence, shards)


def processes_of_a_sequence(accelerator: Accelerator) -> int:
    """How many processes share one sequence."""
    parallelism: Any = getattr(accelerator, "parallelism_config", None)
    return 1 if parallelism is None else parallelism.cp_size * parallelism.sp_size


def _check_ring(recipe: Recipe, model: Any, accelerator: Accelerator, parallelism: Any) -> None:
    """Torch's context parallel takes plain causal attention by sdpa, without a mask."""
    used = causal_model(model).config._attn_implementation
    if used != "sdpa":
        raise PatchError(
            f"context parallelism takes attention by 'sdpa' alone, and with {_scheme(model)} the model has {used!r}; use DeepSpeed Ulysses "
            "(recipes/accelerate/ulysses.yaml), or a rotary scaling on sdpa"
        )
    if recipe.data.packing == "documents":
        raise PatchError(
            "context parallelism hands on no mask, so documents that are packed into one row would see each other; set data.packing to "
            "blocks or joined"
        )
    if accelerator.device.type == "cpu":
        raise PatchError(
            "torch's context parallelism has no kernel for a CPU; use DeepSpeed Ulysses (recipes/accelerate/ulysses.yaml)"
        )
    _check_whole_parts(
        recipe, 2 * parallelism.cp_size, "context parallelism deals each row out in twice as many parts as processes"
    )


def _check_ulysses(recipe: Recipe, model: Any, parallelism: Any) -> None:
    """DeepSpeed's wrapper hands on no mask; hfpos's attention brings its own."""
    config = causal_model(model).config
    size, heads = parallelism.sp_size, config.num_attention_heads
    if heads % size:
        raise PatchError(
            f"Ulysses shares {heads} heads among {size} processes; expected a number of processes that divides the heads"
        )
    used = config._attn_implementation
    if "eager" in used:
        raise PatchError(
            f"Ulysses leaves {used!r} attention without a causal mask; set model.attn_implementation to sdpa"
        )
    ours = used.startswith("hfpos_")
    if recipe.data.packing == "documents" and not ours and "flash" not in used:
        raise PatchError(
            f"Ulysses hands no mask on to {used!r}, so documents that are packed into one row would see each other; set data.packing to "
            "blocks or joined, or model.attn_implementation to flash_attention_2"
        )
    windowed = windowed_layers(config)
    if windowed:
        raise PatchError(
            f"layers of type {', '.join(windowed)} lose their window under Ulysses; use a model whose layers all "
            "see everything, or FSDP2 without sequence parallelism"
        )
    _check_whole_parts(recipe, size, "Ulysses gives each process an equal part of a row")


def _check_whole_parts(recipe: Recipe, parts: int, why: str) -> None:
    if recipe.data.length % parts:
        raise PatchError(
            f"{why}, and data.length={recipe.data.length} cannot be divided by {parts}; choose a multiple of it"
        )
    if recipe.model.shifted_groups is not None:
        raise PatchError(
            "shifted sparse attention needs whole rows in each process; leave out model.shifted_groups, or sequence parallelism"
        )


def _check_shards(recipe: Recipe, model: Any, accelerator: Accelerator) -> None:
    kinds = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    if len(kinds) > 1 and accelerator.distributed_type == DistributedType.FSDP and accelerator.mixed_precision == "no":
        raise PatchError(
            f"FSDP shards weights of one dtype, and with {_scheme(model)} the model has {', '.join(sorted(map(str, kinds)))} (what a scheme "
            "learns is float32); set training.bf16 to true, for which the weights are kept in float32, or model.dtype to float32"
        )
    evaluation = recipe.evaluation
    if evaluation is not None and evaluation.max_regression is not None:
        raise PatchError(
            "evaluation.max_regression needs the unpatched model's perplexity, which is not measured where weights lie in shards; leave it "
            "out and use `hfpos compare --max-regression` on the result"
        )


def _scheme(model: Any) -> str:
    record = record_of(language_model(model))
    return "its own positions" if record is None else str(record.scheme)
