"""Numbers that stay what they are: float32 on every device, whatever becomes of the model's dtype."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import torch


def exact(values: Sequence[float]) -> torch.Tensor:
    """The float64 tensor of `values`, made by numpy: inside DeepSpeed's `zero.Init` torch's own constructors round to bfloat16."""
    return torch.from_numpy(numpy.array(values, dtype=numpy.float64))


class Constant:
    """A float32 tensor, kept apart from modules, parameters and buffers, with a copy on each device that asks for one.

    `.to(bfloat16)`, `to_empty`, meta initialisation, DDP's buffer broadcast and FSDP's sharding never reach it; that is why slopes and
    frequencies live in it and not in buffers.

    >>> Constant(torch.tensor([0.5, 0.25])).on("cpu")
    tensor([0.5000, 0.2500])
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.detach().to("cpu", torch.float32)
        self._copies: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device | str) -> torch.Tensor:
        """The tensor on `device`."""
        device = torch.device(device)
        if device.type == "cpu":
            return self.values
        if torch.compiler.is_compiling():
            return self._copies[device] if device in self._copies else self.values.to(device)
        if device not in self._copies:
            self._copies[device] = self.values.to(device)
        return self._copies[device]

    def __getstate__(self) -> dict:
        return {"values": self.values, "_copies": {}}
