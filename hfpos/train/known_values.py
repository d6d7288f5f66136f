"""Answers what a model asks of tensors without content."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


LARGEST = 2**21  # elements of a tensor that is also computed in earnest
UNKNOWN = ("empty", "rand", "normal", "bernoulli")


class KnownValues(TorchDispatchMode):
    """Computes in earnest what follows from shapes alone, such as positions, beside hollow tensors of the same.

    So a model that looks at its positions goes the way that it goes with full rows without padding. What depends on weights or tokens is
    not known: a model that asks for it hears yes, or `length`.

    Args:
        length: tokens of a row.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls
            return func(*args, **kwargs)
        known = self._is_known(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except DynamicOutputShapeException:
            if not known:
                raise
            real = self._compute(func, args, kwargs)
            result = tree_map_only(torch.Tensor, lambda each: torch.empty_like(each, device="cpu"), real)
            return self._remember(result, real)
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return self._compute(func, args, kwargs) if known else self._guess(args[0].dtype)
        # hollow first: two rows of positions may well make a square that is too large to have
        if known and all(each.numel() <= LARGEST for each in _tensors(result)):
            self._remember(result, self._compute(func, args, kwargs))
        return result

    def _is_known(self, func: Any, args: Any, kwargs: Any) -> bool:
        if any(name in func.__name__ for name in UNKNOWN):
            return False
        return all(not isinstance(each, FakeTensor) or each in self._known for each in _tensors((args, kwargs)))

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = tree_map_only(FakeTensor, lambda each: self._known[each], (args, kwargs))
        with _disable_current_modes():
            return func(*args, **kwargs)

    def _remember(self, result: Any, real: Any) -> Any:
        for hollow, content in zip(_tensors(result), _tensors(real), strict=True):
            self._known[hollow] = content
        return result

    def _guess(self, dtype: torch.dtype) -> bool | int | float:
        return True if dtype == torch.bool else float(self.length) if dtype.is_floating_point else self.length


def _tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]
