"""What a result was measured with: it belongs beside every score."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import hfpos


def provenance() -> dict[str, Any]:
    """Return versions, hardware, time, commit and command as plain JSON values.

    >>> sorted(provenance())
    ['command', 'commit', 'date', 'hardware', 'versions']
    """
    packages = ("torch", "transformers", "tokenizers", "accelerate", "numpy")
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
        "commit": _commit(),
        "hardware": hardware,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _commit() -> str | None:
    """The commit of hfpos itself, where it runs from its repository; None where it was installed from a package."""
    root = Path(hfpos.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
