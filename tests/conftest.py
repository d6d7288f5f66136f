"""Settings that hold for every test and doctest: no network, one thread a process, deprecations of Transformers fail."""

import logging
import os
import tempfile


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start; this one is set below

import torch
import transformers


class _DeprecationsFail(logging.Handler):
    """Transformers announces many removals in its log only, where no warning filter sees them."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower() or "will be removed" in message.lower():
            raise AssertionError(f"Transformers logged a deprecation: {message}")


_CACHE = tempfile.TemporaryDirectory(prefix="hfpos-tests-")
os.environ["HFPOS_CACHE"] = _CACHE.name  # never the user's own

torch.set_num_threads(1)  # tiny models are slower on more, many times so where another process is busy
transformers.logging.disable_progress_bar()
transformers.logging.add_handler(_DeprecationsFail(logging.WARNING))
