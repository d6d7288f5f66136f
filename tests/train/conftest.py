"""One workshop for all tests of training runs: the small models they begin with are trained once."""

import gc

import pytest

from tests.train.runs import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """With the base models in `runs/tiny`."""
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    for name in ("base-llama", "base-gpt2", "base-bloom"):
        made.tiny(name)
    gc.freeze()  # Trainer collects garbage in every run, and what was imported is none
    yield made
    gc.unfreeze()
