"""Peak memory of a call, as the operating system sees it."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable

import psutil


def peak_bytes(call: Callable[[], object]) -> int:
    """How far the process's resident memory rises above its start during `call`, in bytes, sampled every millisecond.

    >>> peak_bytes(lambda: bytearray(50_000_000)) > 0
    True
    """
    _release()
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
