"""What one process holds of a model's parameters: weights, gradients, optimizer states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from hfpos.patching import language_model
from hfpos.scheme import PatchError
from hfpos.train.optimizer_memory import OptimizerMemory


# bytes of a quantised weight, its scales included: NormalFloat4 with double quantisation (arXiv 2305.14314), and LLM.int8
QUANTISED = {4: 0.5 + 0.127 / 8, 8: 1.0}


@dataclass(frozen=True)
class Layout:
    """How a step is laid out over processes.

    Attributes:
        processes: all of them: data * sequence.
        data: replicas that see different samples (DDP, or data parallel with shards).
        sequence: processes that share one sequence (Ulysses, context parallel).
        shards: what is divided over data * sequence: nothing (DDP), gradients and optimizer states (ZeRO-2), or the weights too
            (FSDP2, ZeRO-3).
    """

    processes: int = 1
    data: int = 1
    sequence: int = 1
    shards: Literal["none", "gradients", "all"] = "none"

    def __post_init__(self) -> None:
        if min(self.processes, self.data, self.sequence) < 1 or self.processes != self.data * self.sequence:
            raise PatchError(
                f"layout: processes={self.processes} is not data={self.data} times sequence={self.sequence}, each at least 1"
            )
        if self.shards not in ("none", "gradients", "all"):
            raise PatchError(f"layout: shards={self.shards!r}; expected none, gradients or all")


@dataclass(frozen=True)
class Held:
    """What one process holds of one parameter, in bytes.

    Attributes:
        dtype: that the forward computes in.
        whole: the parameter as the forward needs it.
        weight: what is kept of it, a second copy of full precision included.
        gradient: what is kept of its gradient; 0 where it is frozen.
        state: the optimizer's.
        unpacked: the parameter in `dtype`, where it is quantised; else 0.
    """

    dtype: torch.dtype
    whole: int
    weight: int
    gradient: int
    state: int
    unpacked: int


def holdings(
    model: nn.Module,
    *,
    dtype: torch.dtype | None,
    weight_bits: int | None,
    mixed: torch.dtype | None,
    optimizer: OptimizerMemory,
    layout: Layout,
) -> dict[nn.Parameter, Held]:
    """What one process holds of each parameter.

    Args:
        dtype: that weights are loaded in, those of adapters excepted; None: as they are.
        weight_bits: 4 or 8 where the frozen linear layers are quantised. All other frozen weights are float32 then, as PEFT makes them.
        mixed: the 16-bit dtype of mixed precision, None without.
        optimizer: of the trained ones.
        layout: who holds which part.
    """
    parts = layout.processes if layout.shards != "none" else 1
    # engines that shard compute in 16-bit copies of the weights; autocast casts within the forward instead
    compute = mixed if layout.shards != "none" else None
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    quantised = _linear_weights(model) if weight_bits is not None else set()
    adapters = hasattr(model, "peft_config")

    def held(parameter: nn.Parameter) -> Held:
        count, trained = parameter.numel(), parameter.requires_grad
        packed = id(parameter) in quantised and not trained
        own = parameter.dtype
        if packed:  # what comes out of such a layer is what goes in: 16 bits only under mixed precision
            own = mixed or torch.float32
        elif own.is_floating_point and not (adapters and trained):
            own = torch.float32 if weight_bits is not None else dtype or own
        used = compute if compute is not None and own.is_floating_point else own
        whole = round(count * QUANTISED[weight_bits]) if packed and weight_bits else count * used.itemsize
        kept = whole if packed else count * own.itemsize
        if layout.shards == "gradients" and used != own:  # DeepSpeed: a 16-bit model beside full precision in shards
            weight = whole + (-(-kept // parts) if trained else 0)
        else:
            weight = -(-kept // (parts if layout.shards == "all" else 1))
        gradient = -(-count * own.itemsize // parts) if trained else 0
        state = -(-optimizer.kept(parameter.shape, own, id(parameter) in embeddings) // parts) if trained else 0
        return Held(used, whole, weight, gradient, state, count * used.itemsize if packed else 0)

    return {parameter: held(parameter) for parameter in model.parameters()}


def gathered(model: nn.Module, held: dict[nn.Parameter, Held]) -> tuple[int, int]:
    """Whole weights and whole gradients, in bytes, that a process has beside its shards when everything is sharded.

    What is in no layer (embeddings, head) stays gathered through a step; of the layers there are two, one computed and one on its way.
    """
    kinds = set(language_model(model)._no_split_modules or ())
    layers = [list(module.parameters()) for module in model.modules() if type(module).__name__ in kinds]
    inside = {parameter for layer in layers for parameter in layer}
    outside = [parameter for parameter in held if parameter not in inside]

    def size(parameters: list, counts: Callable[[Any], bool]) -> int:
        return sum(held[each].whole for each in parameters if counts(each))

    largest = max((size(layer, lambda each: True) for layer in layers), default=0)
    trained = max((size(layer, lambda each: each.requires_grad) for layer in layers), default=0)
    return size(outside, lambda each: True) + 2 * largest, trained


def _linear_weights(model: nn.Module) -> set[int]:
    """The ids of the weights that a quantised model has packed: those of all linear layers but the head."""
    head = language_model(model).get_output_embeddings()
    kinds = ("Linear", "Conv1D")
    return {id(each.weight) for each in model.modules() if type(each).__name__ in kinds and each is not head}
