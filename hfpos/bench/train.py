"""Training by recipes: a step against plain Transformers, PoSE against short windows, and what recipes make of small models.

| part | what it is |
|---|---|
| `step` | 8,192 tokens, 32,000 words: time and peak memory of a step against a plain `transformers.Trainer` |
| `pose` | PoSE to 16 times the window: time of a step against plain positions |
| `quality` | small models trained here (once: they stay in `runs/bench`), extended by recipes to four times their length |
| `gpu` | where there is one: a larger step, and a LLaMA of 70 million parameters at 4 and 16 times its length |
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch

from hfpos.bench import train_gpu
from hfpos.bench.train_cases import CASES
from hfpos.bench.train_quality import extend
from hfpos.bench.train_step import pose, step


def run(folder: Path = Path("runs/bench")) -> dict[str, Any]:
    """Everything that the CPU can do; on a GPU, that too. Base models are taken from `folder`, or trained and left there."""
    with contextlib.redirect_stdout(sys.stderr):  # Trainer prints there, and stdout has the figures
        results: dict[str, Any] = {
            "step": step(),
            "pose": pose(),
            "quality": {name: extend(name, case, folder) for name, case in CASES.items()},
        }
        if torch.cuda.is_available():
            results["gpu"] = train_gpu.run(folder)
    return results
