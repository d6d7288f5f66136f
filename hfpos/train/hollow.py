"""A model without content: every tensor has a shape and a dtype, computes shapes and dtypes, and takes no memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import import_utils

from hfpos.patching import language_model
from hfpos.train.kernels import PlayedKernels
from hfpos.train.known_values import KnownValues


FUSED = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


def meta_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """A copy of a model on meta, none of whose weights is copied.

    Args:
        memo: gets the copy of each tensor, by the id of the original.

    >>> linear = meta_copy(nn.Linear(2, 3))
    >>> linear.weight.is_meta, linear.weight.shape
    (True, torch.Size([3, 2]))
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for tensor in (value for names in _places(module) for value in names.values()):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
                kept = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(twin, requires_grad=tensor.requires_grad) if kept else twin
    return copy.deepcopy(model, memo)


def make_hollow(model: nn.Module, dtypes: dict[nn.Parameter, torch.dtype]) -> dict[nn.Parameter, nn.Parameter]:
    """Give a model on meta tensors that say they are on a CPU; call inside `hollow()`.

    Args:
        dtypes: what each parameter becomes.

    Returns:
        the new parameter of each one before.
    """
    memo: dict[int, torch.Tensor] = {}
    new = {}
    for parameter, dtype in dtypes.items():
        content = torch.empty(parameter.shape, dtype=dtype, device="cpu")
        memo[id(parameter)] = new[parameter] = nn.Parameter(content, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for names in _places(module):
            for name, tensor in list(names.items()):
                if isinstance(tensor, torch.Tensor):
                    if id(tensor) not in memo:
                        memo[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    names[name] = memo[id(tensor)]
    language = language_model(model)
    if language.config._attn_implementation in FUSED:  # no such kernel for hollow tensors; what it keeps is the same
        language.set_attn_implementation("sdpa")
    return new


@contextlib.contextmanager
def hollow(length: int, device: str) -> Iterator[None]:
    """Tensors made inside are hollow.

    Args:
        length: tokens of a row.
        device: "cuda" or "cpu": whose kernels are played.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        KnownValues(length),
        PlayedKernels(device),
        # Transformers would think it is traced, and then makes the dense causal masks that it leaves out otherwise
        mock.patch.object(import_utils, "is_fake_tensor", return_value=False),
    ):
        yield


def _places(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """Where a module may have tensors of its own."""
    return module._parameters, module._buffers, module.__dict__
