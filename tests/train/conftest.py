"""One workshop for all tests of training runs: the small models they begin with are trained once."""

import pytest

from tests.train.runs import Workshop


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """With the base models in `runs/tiny`."""
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    for name in ("base-llama", "base-gpt2", "base-bloom"):
        made.tiny(name)
    return made
