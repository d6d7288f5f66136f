"""Two processes with `DistributedDataParallel`: nothing of a scheme is in a buffer that the ranks share."""

import sys
from datetime import timedelta

import pytest
import torch

from tests.pairs import Pair, tokens
from tests.processes import leave, torchrun


PAIRS = {
    "yarn": Pair("llama", "yarn", {"factor": 4}),
    "dynamic": Pair("llama", "dynamic", {"factor": 4}),
    "pinned": Pair("llama", "dynamic", {"cache": "pinned"}),
    "alibi": Pair("bloom", "alibi", {"factor": 4}),
    "rope": Pair("gpt2", "yarn", {"factor": 4}),
    "kerple": Pair("llama", "kerple"),
}
LENGTHS = (60, 20)  # tokens of each rank's batch: beyond the trained length, and within it


def loss_of(model, rank):
    """The mean loss of one rank's batch."""
    ids = tokens(2, LENGTHS[rank], seed=rank)
    return model(input_ids=ids, labels=ids).loss


def rank_main(folder):
    """What each process does: two steps of forward and backward, and the gradients of the second."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = torch.distributed.get_rank()
    for name, pair in PAIRS.items():
        model = torch.nn.parallel.DistributedDataParallel(pair.model().train())
        for _ in range(2):
            model.zero_grad()
            loss = loss_of(model, rank)
            loss.backward()
        gradients = {key: weight.grad for key, weight in model.module.named_parameters() if weight.grad is not None}
        torch.save((loss.item(), gradients), f"{folder}/{name}-{rank}.pt")
    leave()


def test_two_processes_are_one(tmp_path):
    torchrun("-m", __name__, str(tmp_path))
    for name, pair in PAIRS.items():
        model = pair.model().train()
        losses = [loss_of(model, rank) for rank in (0, 1)]
        (sum(losses) / 2).backward()
        expected = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
        for rank in (0, 1):
            loss, gradients = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert loss == pytest.approx(losses[rank].item(), rel=1e-6)
            assert gradients.keys() == expected.keys()
            for key, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    rank_main(sys.argv[1])
