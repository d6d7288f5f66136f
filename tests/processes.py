"""Tests of several processes: starting a test module's own main in two of them, and leaving them."""

import os
import subprocess
import sys
from collections.abc import Sequence

from hfpos.evaluate.processes import leave


__all__ = ["accelerate_launch", "leave", "torchrun"]


def torchrun(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `python arguments` in two processes; an error of one fails the test."""
    return start("torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments, **environment)


def accelerate_launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """As `torchrun`, by `accelerate launch`."""
    launch = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launch += ["--rdzv_backend=c10d", "--main_process_port=0"]
    return start("accelerate.commands.launch", *launch, *arguments, **environment)


def start(module: str, *arguments: str, fails: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """Run `python -m module arguments` on one thread; its output is in the message where it does not end well."""
    command: Sequence[str] = [sys.executable, "-m", module, *arguments]
    given = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    ran = subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=300)
    assert fails == (ran.returncode != 0), ran.stdout[-1500:] + ran.stderr[-3000:]
    return ran
