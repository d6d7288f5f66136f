"""What to change in a recipe so that its training fits into memory."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hfpos.patching import causal_model
from hfpos.scheme import PatchError
from hfpos.train.holdings import Layout
from hfpos.train.hollow import meta_copy
from hfpos.train.lora import add_lora
from hfpos.train.memory import Memory, estimate, size
from hfpos.train.sections import Lora


MOST_PROCESSES = 64
WORTH = 0.98  # a change that leaves more than this of what is needed is not worth a line


def advice(model: nn.Module, available_bytes: float, known: Memory | None = None, **settings: Any) -> list[str]:
    """What to change, one thing on top of the other, the least harmful first, until training fits.

    First what changes no result (loss in chunks, checkpointing, smaller micro-batches), then precision, then what is trained, then more
    processes. Changes that bring nothing are left out. Each line names the key of the recipe and what is needed with it.

    Args:
        model: as for `estimate`; not changed.
        available_bytes: of one device, e.g. `80 * 2**30`.
        known: what `estimate` gives for these settings, where that is at hand.
        settings: the other arguments of `estimate`.

    Returns:
        nothing where it fits already; a last line says so where nothing helps.

    Raises:
        PatchError: as `estimate` does, and for no memory at all.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> with torch.device("meta"):
    ...     model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2))
    >>> advice(model, 80 * 2**30, length=4096)
    []
    >>> for line in advice(model, 14 * 2**30, length=8192, chunked_loss=False):
    ...     print(line)
    chunked loss: 15.13 GiB instead of 16.96 GiB
    gradient checkpointing (training.gradient_checkpointing: true): 13.26 GiB
    """
    if available_bytes <= 0:
        raise PatchError(f"available_bytes={available_bytes}; expected the memory of one device")
    lines, after = lower(model, known or estimate(model, **settings), available_bytes, **settings)
    if after.needed <= available_bytes:
        return lines
    lines.append(
        f"with all of that {size(after.needed)} are needed and {size(available_bytes)} are there: take a shorter data.length, a smaller "
        "model, or devices with more memory"
    )
    return lines


def lower(model: nn.Module, before: Memory, available_bytes: float, **settings: Any) -> tuple[list[str], Memory]:
    """The changes of `advice`, as lines, and what is needed after them.

    Args:
        before: what `estimate` gives for these settings.
    """
    lines: list[str] = []
    memory = before
    if before.needed <= available_bytes:
        return lines, memory
    for text, memory in _State(model, settings, before, available_bytes).changes():
        lines.append(f"{text}: {size(memory.needed)}" + ("" if lines else f" instead of {size(before.needed)}"))
        if memory.needed <= available_bytes:
            break
    return lines, memory


class _State:
    """A recipe's settings, and what they need, as changes are made to them."""

    def __init__(self, model: nn.Module, settings: dict[str, Any], memory: Memory, available: float) -> None:
        self.model, self.settings, self.memory, self.available = model, settings, memory, available

    def changes(self) -> Iterator[tuple[str, Memory]]:
        """Each change that lowers what is needed, made, with what is needed then."""
        yield from self._shorter_evaluation()
        for group in (self._same_results, self._lower_precision, self._processes):
            for change in group():
                yield change
                yield from self._shorter_evaluation()

    def _shorter_evaluation(self) -> Iterator[tuple[str, Memory]]:
        """Where training fits and only its evaluation does not."""
        length = self.settings.get("evaluation_length")
        if length is None or self.memory.total + self.memory.overhead > self.available:
            return
        while self.memory.needed > self.available and length >= 4:
            length //= 2
            self.settings = self.settings | {"evaluation_length": length}
            self.memory = estimate(self.model, **self.settings)
        yield f"no evaluation longer than {length} tokens (evaluation.lengths)", self.memory

    def _same_results(self) -> Iterator[tuple[str, Memory]]:
        given = self.settings
        if not given.get("chunked_loss", True):
            yield from self._try("chunked loss", chunked_loss=True)
        if given.get("packed", False):
            text = "flash attention, which packed documents need no mask for (model.attn_implementation: flash_attention_2)"
            yield from self._try(text, packed=False)
        if not given.get("checkpointing", False):
            yield from self._try("gradient checkpointing (training.gradient_checkpointing: true)", checkpointing=True)
        rows, steps = given.get("batch_size", 1), given.get("gradient_accumulation_steps", 1)
        if rows > 1:
            yield from self._try(
                f"one sample at a time (training.per_device_train_batch_size: 1, training.gradient_accumulation_steps: {rows * steps})",
                batch_size=1,
                gradient_accumulation_steps=rows * steps,
            )

    def _lower_precision(self) -> Iterator[tuple[str, Memory]]:
        given = self.settings
        if given.get("mixed_precision", "no") == "no":
            yield from self._try("mixed precision (training.bf16: true)", mixed_precision="bf16")
        if not hasattr(self.model, "peft_config") and importlib.util.find_spec("peft") is not None:
            adapted = add_lora(meta_copy(self.model), Lora.model_validate({}))
            yield from self._try(
                "LoRA on bfloat16 weights (lora: {}, model.dtype: bfloat16)", adapted, dtype=torch.bfloat16
            )
        if "8bit" not in given.get("optimizer", ""):
            yield from self._try("an 8-bit optimizer (training.optim: adamw_bnb_8bit)", optimizer="adamw_bnb_8bit")
        if hasattr(self.model, "peft_config") and given.get("weight_bits") is None:
            text = "QLoRA (model.quantization: 4bit, training.bf16: true)"
            yield from self._try(text, weight_bits=4, mixed_precision="bf16")

    def _processes(self) -> Iterator[tuple[str, Memory]]:
        layout = self.settings.get("layout") or Layout()
        if layout.shards != "all" or layout.processes < MOST_PROCESSES:
            yield from self._first_that_fits(
                "FSDP2 over {} processes, one on each device",
                [
                    dataclasses.replace(layout, processes=count, data=count // layout.sequence, shards="all")
                    for count in _doubled(max(2, layout.processes), MOST_PROCESSES)
                ],
            )
        layout = self.settings.get("layout") or Layout()
        heads = causal_model(self.model).config.get_text_config().num_attention_heads
        shares = [share for share in _doubled(2 * layout.sequence, heads) if heads % share == 0]
        yield from self._first_that_fits(
            "sequence parallelism, {} processes for each row",
            [
                dataclasses.replace(
                    layout,
                    processes=max(layout.processes, share),
                    data=max(layout.processes, share) // share,
                    sequence=share,
                )
                for share in shares
            ],
        )

    def _first_that_fits(self, text: str, layouts: list[Layout]) -> Iterator[tuple[str, Memory]]:
        """The first of the layouts with which it fits, else the last."""
        found: list[tuple[Memory, Layout]] = []
        for layout in layouts:
            found.append((estimate(self.model, **self.settings | {"layout": layout}), layout))
            if found[-1][0].needed <= self.available:
                break
        if found and found[-1][0].needed <= WORTH * self.memory.needed:
            self.memory, layout = found[-1]
            self.settings = self.settings | {"layout": layout}
            yield text.format(layout.sequence if "row" in text else layout.processes), self.memory

    def _try(self, text: str, model: nn.Module | None = None, **changes: Any) -> Iterator[tuple[str, Memory]]:
        model, settings = model or self.model, self.settings | changes
        memory = estimate(model, **settings)
        if memory.needed <= WORTH * self.memory.needed:
            self.model, self.settings, self.memory = model, settings, memory
            yield text, memory


def _doubled(first: int, last: int) -> list[int]:
    counts = []
    while first <= last:
        counts.append(first)
        first *= 2
    return counts
