"""The loss of next tokens from hidden states and the head's weight, never holding the logits of all tokens.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hfpos.evaluate.scoring import rows_at_once
from hfpos.scheme import PatchError


IGNORED = -100


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """The summed cross entropy of a linear head, in memory that does not grow with N x V, forward and backward.

    The gradients are computed in the forward, with the logits at hand, so the backward only scales them, once: `retain_graph` and
    second derivatives are not there. Under autocast the inputs are cast as a linear layer's would be.

    Args:
        hidden: (N, D), of the weight's dtype unless autocast is on.
        weight: (V, D). No gradient is computed, nor held, of what does not require one.
        labels: (N,), what is to be predicted; -100 counts nothing.
        bias: (V,).
        scale: the logits are multiplied by it.
        softcap: afterwards they are bent by `softcap * tanh(logits / softcap)`.
        chunk: tokens that have their logits at one time; by the vocabulary and the device unless given. Liger's kernel chooses by itself.

    Returns:
        The sum, a scalar; float32, or float64 where the inputs are. Divide it by the number of labels for the mean.

    Raises:
        PatchError: shapes that do not fit together.

    >>> hidden, weight = torch.randn(5, 8), torch.randn(100, 8)
    >>> labels = torch.tensor([1, 2, 3, -100, 99])
    >>> whole = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    >>> torch.allclose(linear_cross_entropy(hidden, weight, labels, chunk=2), whole)
    True
    """
    _check(hidden, weight, labels, bias)
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    chunk = rows_at_once(weight.shape[0], hidden.device) if chunk is None else chunk
    labels = labels.to(hidden.device, torch.int64)
    with torch.autocast(kind, enabled=False):
        kernel = kernel_for(hidden, softcap)
        if kernel == "hfpos":
            learns = torch.is_grad_enabled()
            return _LinearCrossEntropy.apply(hidden, weight, labels, bias, scale, softcap, chunk, learns)
        hidden = hidden if scale == 1 else hidden * scale
        bias = bias if bias is None or scale == 1 else bias * scale
        if kernel == "liger":
            return _liger()(
                hidden,
                weight,
                labels,
                bias=bias,
                ignore_index=IGNORED,
                reduction="sum",
                softcap=softcap,
                accum_dtype=torch.float32,
            )
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        return F.linear_cross_entropy(
            hidden, weight, labels, linear_bias=bias, reduction="sum", ignore_index=IGNORED, options=options
        )


def kernel_for(hidden: torch.Tensor, softcap: float | None = None) -> str:
    """Whose kernel computes the loss of `hidden` (N, D): "liger", "torch" or "hfpos".

    Liger's wants a GPU and gives the weight no gradient where the hidden states need none. Torch's knows no soft cap, and in 16 bits it
    rounds the sum to 16 bits (1.6 % off over 500 tokens in bfloat16).

    >>> kernel_for(torch.zeros(2, 8, dtype=torch.bfloat16))
    'hfpos'
    """
    learnt = hidden.requires_grad or not torch.is_grad_enabled()
    if hidden.device.type == "cuda" and hidden.shape[0] and learnt and _liger() is not None:
        return "liger"
    has_torchs = hasattr(torch.nn, "LinearCrossEntropyOptions")  # from 2.13 on
    if has_torchs and softcap is None and hidden.dtype == torch.float32:
        return "torch"
    return "hfpos"


class _LinearCrossEntropy(torch.autograd.Function):
    """Logits, softmax and gradients of one chunk of tokens after the other, in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        chunk: int,
        learns: bool,
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        of_hidden, of_weight, _, of_bias = (learns and needed for needed in ctx.needs_input_grad[:4])
        # sums over all tokens: exact until the end
        d_hidden = torch.empty_like(hidden) if of_hidden else None
        d_weight = torch.zeros_like(weight, dtype=exact) if of_weight else None
        d_bias = torch.zeros_like(bias, dtype=exact) if of_bias and bias is not None else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight, bias).to(exact)
            loss, d_logits = _softmax_loss(logits, labels[part], scale, softcap)
            total += loss
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[part])
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, hidden[part])
            if d_bias is not None:
                d_bias += d_logits.sum(0, dtype=exact)
        gradients = (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        )
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # in place, as a weight's gradient is large; a second backward finds them changed and raises
        hidden, weight, bias = (None if saved is None else saved.mul_(upstream) for saved in ctx.saved_tensors)
        return hidden, weight, None, bias, None, None, None, None


def _softmax_loss(
    logits: torch.Tensor, labels: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of logits (n, V), which it overwrites, and its gradient (n, V) by the head's output."""
    logits = logits if scale == 1 else logits.mul_(scale)
    bent = None
    if softcap is not None:
        bent = logits.div_(softcap).tanh_()
        logits = bent * softcap
    log_chances = F.log_softmax(logits, dim=-1)
    loss = F.nll_loss(log_chances, labels, ignore_index=IGNORED, reduction="sum")
    gradient = log_chances.exp_()
    counted = labels != IGNORED
    at = labels.where(counted, 0)[:, None]
    gradient.scatter_add_(1, at, gradient.new_full((), -1.0).expand_as(at)).mul_(counted[:, None])
    if bent is not None:
        gradient.mul_(1 - bent.square_())
    return loss, gradient if scale == 1 else gradient.mul_(scale)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, without a copy of the product where the dtypes are alike."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


@functools.cache
def _liger() -> Any:
    """Liger's kernel where it is installed and sums up weight gradients in float32."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    kernel = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return kernel if "accum_dtype" in inspect.signature(kernel).parameters else None


def _check(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None) -> None:
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or labels.shape != hidden.shape[:1] or (bias is not None and bias.shape != weight.shape[:1]):
        raise PatchError(
            f"hidden is {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}, bias "
            f"{None if bias is None else tuple(bias.shape)}; expected (N, D), (V, D), (N,) and (V,): flatten batch and tokens first"
        )
