"""What a model does to its logits between head and loss: measured, and checked against the model's own loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hfpos.patching import afresh, instead
from hfpos.probe import eval_mode


# the first tells the slope, the second whether there is a cap; the others that this is all
_POINTS = (2.0**-10, 2.0**20, 0.0, -1.0, 3.0, 10.0, -40.0, 200.0)


@dataclass(frozen=True)
class Bend:
    """What follows the head: a scale (Cohere, Granite), then a soft cap (Gemma)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits that the loss is taken of.

        >>> Bend(scale=0.5, softcap=30.0)(torch.tensor([2.0, 1000.0]))
        tensor([ 0.9996, 30.0000])
        """
        logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def bend_after(model: PreTrainedModel, head: nn.Module) -> Bend | str:
    """Measure what `model` does to the output of `head`, by sending known numbers through its forward instead of decoder and head.

    No weight is touched, so this works on meta and in shards, too. Where it is not a scale and a soft cap, a string says why.
    """
    points = torch.tensor(_POINTS)
    try:
        found = _after_head(model, head, points)
    except Exception as error:
        return f"computes its loss in a way that could not be followed ({type(error).__name__}: {error})"
    if found is None:
        return "does not call its loss function"
    if found.shape != (1, len(points), 1):
        return "does more to its logits than to scale and cap them"
    numbers = found.double().flatten()
    slope, top = float(numbers[0] / points[0]), float(numbers[1])
    scale = 1.0 if abs(slope - 1) < 1e-6 else slope
    bend = Bend(scale, None if abs(top - scale * _POINTS[1]) < 1e-3 * abs(top) else abs(top))
    if scale == 0 or not torch.allclose(bend(points.double()), numbers, rtol=1e-5, atol=1e-6):
        return "does more to its logits than to scale and cap them"
    return bend


def difference(model: PreTrainedModel, head: nn.Module, everywhere: Callable[[bool], None]) -> str | None:
    """How the chunked loss, or its gradient by the head's input, differs from the model's own on ten tokens; None where it does not.

    Args:
        everywhere: switches the chunked loss on and off, as the model is in eval mode here.
    """
    try:
        with eval_mode(model), afresh(model):
            own = _loss_and_gradient(model, head)
            everywhere(True)
            try:
                chunked = _loss_and_gradient(model, head)
            finally:
                everywhere(False)
    except Exception as error:
        return f"could not be probed ({type(error).__name__}: {error})"
    tolerance = 0.05 if model.dtype in (torch.float16, torch.bfloat16) else 1e-4
    for what, expected, found in zip(("loss", "gradient"), own, chunked, strict=True):
        if not (found - expected).abs().max() <= tolerance * expected.abs().max():
            return f"has another {what} from chunks than from whole logits"
    return None


def _loss_and_gradient(model: PreTrainedModel, head: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of two rows of five tokens, and its gradient by the head's input; no parameter's gradient is touched."""
    inputs: list[torch.Tensor] = []

    def cut(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        inputs.append(args[0].detach().requires_grad_())
        return (inputs[-1], *args[1:])

    embedding: Any = model.get_input_embeddings()
    device = torch.device("cpu") if embedding.weight.is_meta else embedding.weight.device
    ids = torch.arange(10, device=device).view(2, 5) * 7 % embedding.weight.shape[0]
    labels = ids.clone()
    labels[0, 2], labels[1, 3:] = -100, -100
    handle = head.register_forward_pre_hook(cut)
    try:
        with torch.enable_grad():
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False)[0]
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(loss, inputs)
    return loss.detach().float(), gradient.float()


@torch.no_grad()
def _after_head(model: PreTrainedModel, head: nn.Module, points: torch.Tensor) -> torch.Tensor | None:
    """What the loss function gets for logits where the head gives `points`; None where it is not called."""
    seen: list[torch.Tensor] = []

    def loss(logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(logits)
        return torch.zeros(())

    ids = torch.zeros(1, len(points), dtype=torch.int64)
    hidden = _Hollow(last_hidden_state=torch.zeros(1, len(points), model.config.get_text_config().hidden_size))
    forward: Any = type(model).forward
    named = inspect.signature(forward).parameters
    plainly = {name: value for name, value in (("use_cache", False), ("output_router_logits", False)) if name in named}
    with (
        instead(model.get_decoder(), "forward", lambda *args, **kwargs: hidden),
        instead(head, "forward", lambda *args, **kwargs: points[None, :, None]),
        instead(model, "_loss_function", loss),
    ):
        forward(model, input_ids=ids, labels=ids, **plainly)
    return seen[0] if seen else None


class _Hollow(BaseModelOutput):
    """A decoder's output that has everything a model may ask for, and it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
