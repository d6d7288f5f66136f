"""What a result was measured with: it belongs beside every score."""

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch

import hfpos


def provenance() -> dict[str, Any]:
    """Return versions, hardware and time as plain JSON values.

    >>> sorted(provenance())
    ['date', 'hardware', 'versions']
    """
    packages = ("torch", "transformers", "tokenizers", "numpy")
    hardware = {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "hfpos": hfpos.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "hardware": hardware,
    }
