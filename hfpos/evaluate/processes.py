"""Several processes measuring together (`accelerate launch`): each takes its share of the documents, all get the whole result."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hfpos.scheme import PatchError


T = TypeVar("T")


def launched() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1


def local(model: nn.Module) -> nn.Module:
    """The model without `DistributedDataParallel`, which waits in each forward for the other processes; they may have fewer to run."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether a part of the weights lies on other processes."""
    return any(hasattr(weight, "placements") or hasattr(weight, "ds_id") for weight in model.parameters())


def share(model: nn.Module) -> tuple[int, int]:
    """This process's number and how many there are to divide documents among.

    A model whose weights lie in shards on the processes needs all of them for every forward: then each runs all documents.
    """
    if not launched() or is_sharded(model):
        return 0, 1
    return _state().process_index, _state().num_processes


def gather(mine: list[T], error: PatchError | None, processes: int) -> list[T]:
    """All processes' items. Where one of them failed, all raise its error, so that none waits for ever."""
    if processes == 1:
        if error is not None:
            raise error
        return mine
    everyone: list[Any] = gather_object([(mine, error and str(error))])
    errors = [text for _, text in everyone if text is not None]
    if errors:
        raise PatchError(errors[0]) from error
    return [item for items, _ in everyone for item in items]


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, in every process; the others do not call it. Its `PatchError` is raised in all.

    So processes that go on from what one of them reads, writes or measures all take the same path.

    >>> from_main(lambda: 3)
    3
    """
    if not launched():
        return make()
    made: list[T] = []
    error = None
    if is_main():
        try:
            made.append(make())
        except PatchError as caught:
            error = caught
    return gather(made, error, processes=2)[0]


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return not launched() or _state().is_main_process


def device() -> torch.device:
    """The device of this process: the one accelerate assigned, else the first accelerator, else the CPU."""
    if launched():
        return _state().device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def leave() -> None:
    """End a process of several, when all have come here. Where gloo connects them, without Python's clean-up: that holds Python's lock while
    it waits for gloo's thread, which may just then be waiting for the lock.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    distributed.barrier()
    if "gloo" in distributed.get_backend():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    distributed.destroy_process_group()


def _state() -> PartialState:
    # without an accelerator, accelerate joins the processes only if it is told that the CPU is meant
    return PartialState(cpu=not torch.accelerator.is_available())
