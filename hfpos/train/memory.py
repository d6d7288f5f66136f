"""How much memory a training step and an evaluation need on each process, found without weights and without a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hfpos.families._tables import NoPositions
from hfpos.families.learned_table import tables
from hfpos.patching import causal_model
from hfpos.scheme import PatchError, did_you_mean
from hfpos.train.holdings import QUANTISED, Held, Layout, gathered, holdings
from hfpos.train.optimizer_memory import OptimizerMemory, optimizer_memory
from hfpos.train.rehearsal import ACTIVATIONS, GRADIENTS, LOSS, WEIGHTS, Rehearsal


MIXED = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZER = "optimizer"
CUDA_OVERHEAD = 2**30  # context, libraries' workspaces, communication buffers


@dataclass(frozen=True)
class Memory:
    """Bytes on one process.

    The first five are those of one moment, the one in a training step at which their sum is largest: while gradients are computed, those
    of the last layers need not be there yet; while the optimizer steps, no activation is.

    Attributes:
        weights: parameters and buffers; with sharded weights also what is gathered of them.
        gradients: of parameters, with DDP's buckets.
        optimizer: its states, and while it steps what it needs on the way.
        activations: all else that forward and backward hold.
        loss: logits and what is computed of them.
        moment: "forward and backward" or "optimizer step".
        evaluation: the highest of an evaluation between two steps; 0 where none was asked for.
        kv_cache: the part of `evaluation` that the cache of keys and values has.
        overhead: an allowance, not an estimate: what a CUDA process has beside tensors. Fragmentation is not in it.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    moment: str
    evaluation: int
    kv_cache: int
    overhead: int

    @property
    def total(self) -> int:
        """The peak of a training step, which `torch.cuda.max_memory_allocated` would show."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss

    @property
    def needed(self) -> int:
        """What a device must have: the larger one of training and evaluation, and the overhead."""
        return max(self.total, self.evaluation) + self.overhead

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations", "loss", "total")
        lines = [f"peak of a training step, in {self.moment}"]
        lines += [f"  {part:<12}{size(getattr(self, part)):>12}" for part in parts]
        if self.evaluation:
            lines += [f"{'evaluation':<14}{size(self.evaluation):>12}", f"  {'KV cache':<12}{size(self.kv_cache):>12}"]
        lines += [f"{'overhead':<14}{size(self.overhead):>12}", f"{'needed':<14}{size(self.needed):>12}"]
        return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for people.

    >>> size(3 * 2**29), size(2**20)
    ('1.50 GiB', '1.0 MiB')
    """
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def estimate(
    model: nn.Module,
    *,
    length: int,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw_torch_fused",
    mixed_precision: str = "no",
    checkpointing: bool = False,
    chunked_loss: bool = True,
    gradient_accumulation_steps: int = 1,
    layout: Layout | None = None,
    weight_bits: int | None = None,
    optimizer_offload: bool = False,
    packed: bool = False,
    evaluation_length: int | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> Memory:
    """The memory of training a causal language model, on each process.

    The model's own forward, loss and backward run once on tensors that have shapes and dtypes but no content, and the bytes alive are
    counted: no formula of any family, and a 7B model at 65,536 tokens takes seconds. What kernels use inside, the CUDA context and
    fragmentation are not counted; `Memory.overhead` is an allowance for the context. Rows are full, without padding.

    Args:
        model: on meta or not, patched and with LoRA or not; `requires_grad` says what is trained. It is not changed.
        length: tokens of a row.
        batch_size: rows of a micro-batch on one process (on the processes that share a sequence together).
        dtype: that the weights are loaded in; adapters keep theirs. None: as the model has them.
        optimizer: its name in `TrainingArguments.optim`.
        mixed_precision: "no", "bf16" or "fp16", as accelerate does it.
        checkpointing: gradient checkpointing.
        chunked_loss: `hfpos.train.loss`, which holds no logits of a whole row.
        gradient_accumulation_steps: micro-batches of a step; gradients stay between them.
        layout: of a step over processes; one process unless given.
        weight_bits: 4 or 8 where bitsandbytes quantises the frozen linear layers (QLoRA).
        optimizer_offload: optimizer states and its step are in main memory.
        packed: rows hold several documents, told apart by `position_ids`, for which sdpa and eager attention take dense masks.
        evaluation_length: tokens of the longest row that is evaluated in between, with a cache.
        device: whose kernels are played, "cuda" or "cpu".

    Raises:
        PatchError: a number out of range, a length past a learned table, an unknown optimizer, or a model whose memory depends on
            the values of tensors.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4))
    >>> whole = estimate(model, length=8192, chunked_loss=False)
    >>> size(whole.weights), whole.total > estimate(model, length=8192).total
    ('3.99 GiB', True)
    """
    layout = layout or Layout()
    _check(model, length, batch_size, gradient_accumulation_steps, mixed_precision, weight_bits, device)
    known = optimizer_memory(optimizer)
    steps = OptimizerMemory(0) if optimizer_offload else known
    mixed = MIXED[mixed_precision]
    held = holdings(model, dtype=dtype, weight_bits=weight_bits, mixed=mixed, optimizer=steps, layout=layout)
    rehearsal = Rehearsal(model, held, mixed, layout.shards == "none", device)
    peak = rehearsal.training(
        batch_size,
        -(-length // layout.sequence),
        checkpointing=checkpointing,
        chunked_loss=chunked_loss,
        accumulates=gradient_accumulation_steps > 1,
        packed=packed,
    )
    lasting, beside = _lasting(held, layout), _beside(model, held, layout)
    within, step = _sum(peak, lasting, beside), _sum(_in_step(model, held, steps, device), lasting)
    highest, moment = (step, "optimizer step") if step.total() > within.total() else (within, "forward and backward")
    evaluation, cache = Counter[str](), 0
    if evaluation_length is not None:
        _check_length(model, evaluation_length, "evaluation_length")
        evaluation, cache = rehearsal.evaluation(evaluation_length)
        evaluation = _sum(evaluation, lasting, Counter(weights=beside[WEIGHTS], activations=beside[ACTIVATIONS]))
    return Memory(
        **{name: highest[name] for name in (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS)},
        moment=moment,
        evaluation=evaluation.total(),
        kv_cache=cache,
        overhead=CUDA_OVERHEAD if device == "cuda" else 0,
    )


def _lasting(held: dict[nn.Parameter, Held], layout: Layout) -> Counter[str]:
    """What is there all the time: optimizer states, and the buckets that DDP copies gradients to."""
    buckets = sum(each.gradient for each in held.values()) if layout.shards == "none" and layout.processes > 1 else 0
    return Counter(optimizer=sum(each.state for each in held.values()), gradients=buckets)


def _beside(model: nn.Module, held: dict[nn.Parameter, Held], layout: Layout) -> Counter[str]:
    """What a forward and its backward hold where weights are quantised (one unpacked at a time) or in shards."""
    weights, gradients = gathered(model, held) if layout.shards == "all" else (0, 0)
    return Counter(weights=weights, gradients=gradients, activations=max(each.unpacked for each in held.values()))


def _in_step(model: nn.Module, held: dict[nn.Parameter, Held], steps: OptimizerMemory, device: str) -> Counter[str]:
    """What is there while the optimizer steps, beside what lasts."""
    weights = sum(each.weight for each in held.values()) + sum(each.nbytes for each in model.buffers())
    gradients = [each.gradient for each in held.values()]
    return Counter(weights=weights, gradients=sum(gradients), optimizer=steps.passing(gradients, device))


def _sum(*parts: dict[str, int]) -> Counter[str]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return total


def _check(
    model: nn.Module, length: int, batch_size: int, steps: int, mixed: str, weight_bits: int | None, device: str
) -> None:
    for name, value in (("batch_size", batch_size), ("gradient_accumulation_steps", steps)):
        if value < 1:
            raise PatchError(f"{name}={value}; expected at least 1")
    if mixed not in MIXED:
        raise PatchError(f"mixed_precision={mixed!r} is not known: {did_you_mean(str(mixed), MIXED)}")
    if weight_bits is not None and weight_bits not in QUANTISED:
        raise PatchError(f"weight_bits={weight_bits}; expected 4 or 8, or None for weights that are not quantised")
    if device not in ("cuda", "cpu"):
        raise PatchError(f"device={device!r}; expected cuda or cpu")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PatchError(f"no parameter of {type(model).__name__} requires a gradient; expected at least one to train")
    _check_length(model, length, "length")


def _check_length(model: nn.Module, length: int, name: str) -> None:
    if length < 2:
        raise PatchError(f"{name}={length}; expected at least 2 tokens, as the first one predicts the second")
    language = causal_model(model)
    for owner, table in tables(language):
        rows = getattr(owner, table).weight.shape[0]
        if length > rows and not isinstance(getattr(owner, table), NoPositions):
            raise PatchError(
                f"{name}={length} does not fit: {type(language).__name__} has a table of {rows} positions; patch it with a scheme that reaches "
                f"further, or set {name} to {rows} at most"
            )
