"""What `hfpos bench` runs."""

from __future__ import annotations

import importlib
from typing import Any

from hfpos.report.provenance import provenance
from hfpos.scheme import PatchError, did_you_mean


BENCHMARKS = ("overhead", "attention", "remapping", "bloom", "eval", "train", "scratch")


def run(name: str = "all") -> dict[str, Any]:
    """Run one benchmark, or `all`; its figures with the versions and the hardware they were measured on.

    Raises:
        PatchError: there is no benchmark of that name.
    """
    if name != "all" and name not in BENCHMARKS:
        raise PatchError(f"unknown benchmark {name!r}: {did_you_mean(name, [*BENCHMARKS, 'all'])}")
    chosen = BENCHMARKS if name == "all" else (name,)
    return provenance() | {each: importlib.import_module(f"hfpos.bench.{each}").run() for each in chosen}
