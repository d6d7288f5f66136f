"""Peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable

import psutil
import torch


def peak_bytes(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """How far memory in use rises above its start during `call`, in bytes.

    On a CPU, the process's resident memory, sampled every millisecond; on a GPU, what PyTorch has allocated there.

    >>> peak_bytes(lambda: bytearray(50_000_000)) > 0
    True
    """
    _release()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return max(torch.cuda.max_memory_allocated(device) - before, 1)
    process, done = psutil.Process(), threading.Event()
    start = process.memory_info().rss
    peak = start

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return max(peak - start, 1)


def _release() -> None:
    """Give freed memory back, so that what an earlier call has left is not used again unseen."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: the figure is then a lower bound
