"""`accelerate launch` with two processes: documents divided, one result, equal to a single process's; an error of one reaches all."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import hfpos
from hfpos.evaluate import key_value, perplexity
from tests.processes import accelerate_launch, leave
from tests.tiny import tiny


def documents():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, (size,), generator=generator).tolist() for size in (60, 47, 33, 52, 20)]


def measure(wrap=None, **arguments):
    """Every kind of result, as plain values."""
    model = tiny("llama", vocab_size=96)
    model = wrap(model) if wrap else model
    found = {}
    for stride in (None, 9):
        result = perplexity(model, documents(), [20, 40], stride, skip_bad=True, **arguments)
        for length, score in result.by_length.items():
            found[f"{stride} {length}"] = [score.nll, score.tokens, score.documents, score.stderr, len(score.curve)]
    for cell in key_value(model, [32, 48], depths=[0, 1], trials=7).cells:
        found[f"key_value {cell.length} {cell.depth}"] = [cell.correct, cell.trials]
    return found


def process_main(folder):
    """What each process does."""
    torch.set_num_threads(1)
    found = {
        "measured": measure(),
        "resumed": measure(resume=f"{folder}/journal"),
        "again": measure(resume=f"{folder}/journal"),
        "wrapped": measure(DistributedDataParallel, batch_size=1),
    }
    model = tiny("llama", vocab_size=96)
    model.register_forward_hook(_spoil, with_kwargs=True)
    try:
        perplexity(model, documents(), [20])
    except hfpos.PatchError as error:
        found["error"] = str(error)
    rank = torch.distributed.get_rank()
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def _spoil(module, args, kwargs, output):
    """Rank 1 alone sees a loss that is not finite."""
    if torch.distributed.get_rank() == 1:
        output.logits[:] = float("nan")


def test_two_processes_are_one(tmp_path):
    accelerate_launch("-m", __name__, str(tmp_path))
    expected = measure()
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert found["measured"].keys() == expected.keys()
        for name, values in expected.items():
            for kind in ("measured", "resumed", "again", "wrapped"):
                assert found[kind][name] == pytest.approx(values, rel=1e-6)
        assert "not a finite number" in found["error"]
    journals = [path.read_text(encoding="utf-8").count('"document"') for path in (tmp_path / "journal").iterdir()]
    assert sum(journals) == 2 * len(documents())  # two protocols, each document once over both processes


if __name__ == "__main__":
    process_main(sys.argv[1])
    leave()
