"""A causal model's training loss without its logits; the model's own forward, and Transformers' Trainer, stay as they are.

The head computes the loss inside its own forward, because that is when FSDP and ZeRO have its weights at hand, and the model's loss
function hands it on. Outside of training, or without labels, both are the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from hfpos.evaluate.scoring import rows_at_once
from hfpos.patching import causal_model
from hfpos.probe import can_run
from hfpos.scheme import PatchError
from hfpos.train.head_probe import Bend, bend_after, difference
from hfpos.train.loss import IGNORED, linear_cross_entropy


@dataclass
class ChunkedLoss:
    """What `chunk_the_loss` did.

    Attributes:
        chunked: whether the model trains without logits now; if not, it is as it was.
        reason: how, or why not; one line to print.
    """

    chunked: bool
    reason: str
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def remove(self) -> None:
        """Give the model its own loss back; nothing of this stays on it."""
        while self._undo:
            self._undo.pop()()


def chunk_the_loss(model: nn.Module, *, chunk: int | None = None) -> ChunkedLoss:
    """Let a causal model compute its training loss from chunks of tokens, so that no logits (length x vocabulary) are ever held.

    In training, with labels, `loss` is the same number with the same gradients, and `logits` are zeros (B, L, 1). Evaluation and
    generation do not change. What the family does to its logits (scale, soft cap) is measured, and the result compared with the
    model's own loss on ten tokens; a model that computes its loss in another way is left as it is, and the reason says so.

    Args:
        model: a Transformers causal model, also wrapped by PEFT: wrap first. Patched by hfpos or not, on any device, in shards or on
            meta (which leaves out the comparison).
        chunk: tokens that have their logits at one time; by the vocabulary and the device unless given.

    Raises:
        PatchError: no language modelling head, or its loss is chunked already.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    ... )
    >>> model = LlamaForCausalLM(config).train()
    >>> ids = torch.arange(10)[None]
    >>> whole = model(input_ids=ids, labels=ids)
    >>> chunked = chunk_the_loss(model)
    >>> found = model(input_ids=ids, labels=ids)
    >>> chunked.chunked, bool((found.loss - whole.loss).abs() < 1e-5), found.logits.shape
    (True, True, torch.Size([1, 10, 1]))
    >>> chunked.remove()
    """
    language = causal_model(model)
    name = type(language).__name__
    if isinstance(getattr(language.__dict__.get("_loss_function"), "__self__", None), _Chunks):
        raise PatchError(f"the loss of {name} is chunked already; call remove() on what chunk_the_loss returned first")
    if language.loss_function is not ForCausalLMLoss:
        return _whole(name, "has a loss function of its own")
    if getattr(language, "_tp_size", None) not in (None, 1):
        return _whole(name, "is tensor parallel, so that no process has all words of a token")
    head = _head_of(language)
    bend = bend_after(language, head)
    if isinstance(bend, str):
        return _whole(name, bend)
    chunks = _Chunks(language, head, bend, chunk)
    installed = ChunkedLoss(True, chunks.describe(), _install(chunks, model))
    if can_run(language):
        differs = difference(language, head, chunks.everywhere)
        if differs is not None:
            installed.remove()
            return _whole(name, differs)
        chunks.called = False
    return installed


def _whole(name: str, why: str) -> ChunkedLoss:
    return ChunkedLoss(False, " ".join(f"whole logits: {name} {why}".split()))


class _Chunks:
    """The state that the three places of a model share: before its forward, in its head, in its loss function.

    A plain object with bound methods, so that a model with it can be copied and pickled.
    """

    def __init__(self, model: PreTrainedModel, head: nn.Module, bend: Bend, chunk: int | None) -> None:
        self.model, self.head, self.bend = model, head, bend
        self.own_forward: Callable[..., torch.Tensor] | None = head.__dict__.get("forward")
        self.plain = type(head).forward is nn.Linear.forward and self.own_forward is None
        self.vocabulary: int = getattr(head, "out_features", model.config.get_text_config().vocab_size)
        self.chunk = chunk
        self.always = False
        self.called = False
        self.targets: torch.Tensor | None = None
        self.total: torch.Tensor | None = None
        self.count: Any = None

    def describe(self) -> str:
        """One line on how the loss is computed."""
        if self.plain:
            return "no logits are held: linear cross entropy of chunks of tokens"
        return f"no logits are held: {type(self.head).__name__} runs on chunks of tokens, and again in the backward"

    def everywhere(self, always: bool) -> None:
        """Whether the loss is chunked outside of training, too."""
        self.always = always

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward: what each token is to predict."""
        self.called = True
        self.targets = self.total = None
        if args and "labels" not in kwargs:
            kwargs = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        if labels is None or not (self.always or (self.model.training and torch.is_grad_enabled())):
            return
        self.targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shifted is None else shifted

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's forward: logits (B, L, V), or the loss, which then travels on as the gradient of zeros (B, L, 1).

        Zeros stay zeros whatever scale or soft cap follows, and the gradient is only scaled. That the loss depends on the head's output
        is what makes FSDP and ZeRO gather the head's weights in the backward.
        """
        targets, self.targets = self.targets, None
        if targets is None or targets.shape != hidden.shape[:-1]:
            return self._logits(hidden)
        flat, labels = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
        total = self._plain(flat, labels) if self.plain else self._by_parts(flat, labels)
        self.total, self.count = total.detach(), (labels != IGNORED).sum().clamp(min=1)
        return (total - self.total).expand(*hidden.shape[:-1], 1).contiguous()

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,  # a tensor or a number
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """In the place of Transformers' `ForCausalLMLoss`. Without a label to predict the mean is 0, not 0 / 0."""
        total, self.total = self.total, None
        if total is None:
            if self.model.training and torch.is_grad_enabled() and not self.called:
                raise PatchError(
                    f"{type(self.model).__name__}.forward was called past its hooks, so its loss cannot be chunked; call the model "
                    "itself, and wrap it (PEFT) before chunk_the_loss"
                )
            return ForCausalLMLoss(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        if ignore_index != IGNORED:
            raise PatchError(f"ignore_index={ignore_index} was given; the chunked loss ignores {IGNORED} only")
        items = self.count if num_items_in_batch is None else num_items_in_batch
        items = items.to(logits.device) if isinstance(items, torch.Tensor) else items
        return (total.to(logits.device) + logits.flatten()[0] / self.bend.scale) / items

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        forward = self.own_forward or partial(type(self.head).forward, self.head)
        return forward(hidden)

    def _plain(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        head: Any = self.head
        return linear_cross_entropy(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            scale=self.bend.scale,
            softcap=self.bend.softcap,
            chunk=self.chunk,
        )

    def _by_parts(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A head that is more than a matrix (LoRA, quantised): its own forward on chunks, run again in the backward."""
        rows = self.chunk or rows_at_once(self.vocabulary, hidden.device)
        losses = [
            checkpoint(self._part, *part, use_reentrant=False)
            for part in zip(hidden.split(rows), labels.split(rows), strict=True)
        ]
        return torch.stack(losses).sum()

    def _part(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.bend(self._logits(hidden).float())
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def _install(chunks: _Chunks, outermost: nn.Module) -> list[Callable[[], None]]:
    """Put the three methods in place; what takes them away again, last one first."""
    model, head = chunks.model, chunks.head
    before = model.__dict__.get("_loss_function")
    # a wrapper may call the inner model's forward past its hooks
    callers = {id(module): module for module in (outermost, model)}.values()
    handles = [module.register_forward_pre_hook(chunks.note, with_kwargs=True) for module in callers]
    setattr(head, "forward", chunks.forward)  # noqa: B010
    setattr(model, "_loss_function", chunks.loss)  # noqa: B010
    return [
        *(handle.remove for handle in handles),
        partial(_put_back, head, "forward", chunks.own_forward),
        partial(_put_back, model, "_loss_function", before),
    ]


def _put_back(module: nn.Module, name: str, value: Any) -> None:
    if value is None:
        delattr(module, name)
    else:
        setattr(module, name, value)


def _head_of(model: PreTrainedModel) -> nn.Module:
    """The output embedding; of one that PEFT trains as a whole, the copy that is trained."""
    head: Any = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    return head if copies is None or not head.active_adapters else copies[head.active_adapters[0]]
