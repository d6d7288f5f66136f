"""Which blocks of memory are asked for: unlike a peak of memory, the same on every run."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def allocations() -> Iterator[set[int]]:
    """The sizes in bytes, filled in at the end, of every block that torch allocates on the CPU, also within its own kernels."""
    sizes: set[int] = set()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield sizes
    events = profile.profiler.kineto_results.events()
    sizes.update(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)
    if not sizes:
        raise RuntimeError("the profiler saw no memory at all")
