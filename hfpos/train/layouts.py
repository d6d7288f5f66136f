"""How an accelerate config lays a step out over processes, read without launching anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hfpos.scheme import PatchError
from hfpos.train.holdings import Layout
from hfpos.train.yaml_files import load_yaml


_SHARDS = {
    0: "none",
    1: "gradients",
    2: "gradients",
    3: "all",
}  # of DeepSpeed's stages; stage 1 keeps whole gradients for a moment


def read_layout(config: str | Path | None, processes: int | None = None) -> tuple[Layout, str]:
    """The layout and the mixed precision ("no", "bf16", "fp16") of an accelerate config; one process without one.

    Args:
        config: e.g. recipes/accelerate/fsdp2.yaml.
        processes: instead of the config's `num_processes`.

    Raises:
        PatchError: no such file, or processes that cannot be divided as it says.

    >>> read_layout(None, processes=4)[0]
    Layout(processes=4, data=4, sequence=1, shards='none')
    """
    values: dict[str, Any] = {} if config is None else load_yaml(config)
    if not isinstance(values, dict):
        raise PatchError(f"{config} holds a {type(values).__name__}; expected a config of accelerate")
    count = processes or int(values.get("num_processes", 1))
    parallelism = values.get("parallelism_config") or {}
    sequence = 1
    for name in ("cp_size", "sp_size"):
        sequence *= int(parallelism.get(f"parallelism_config_{name}", 1))
    if count % sequence:
        raise PatchError(
            f"{config} shares a row among {sequence} processes, and {count} cannot be divided by that; change processes"
        )
    kind = str(values.get("distributed_type", "NO")).upper()
    shards = "none"
    if kind == "FSDP":
        shards = "all"
    elif kind == "DEEPSPEED":
        shards = _SHARDS[int((values.get("deepspeed_config") or {}).get("zero_stage", 2))]
    mixed = str(values.get("mixed_precision", "no"))
    return Layout(count, count // sequence, sequence, shards), mixed  # type: ignore[arg-type]
