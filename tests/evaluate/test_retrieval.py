"""The grid of the retrieval tests: its cells, its table, what it refuses and what it leaves behind."""

import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hfpos.evaluate.key_value import key_value
from hfpos.evaluate.retrieval import Job, RetrievalCell, RetrievalResult, grid, run_grid, wilson
from hfpos.scheme import PatchError
from tests.tiny import tiny


def cell(length, depth, correct, trials):
    return RetrievalCell(length, depth, correct, trials, *wilson(correct, trials))


def test_wilson():
    # solved by hand: |p - 0.3| = z sqrt(p (1 - p) / 20) at both ends
    low, high = wilson(6, 20)
    for end in (low, high):
        assert abs(end - 0.3) == pytest.approx(1.959964 * (end * (1 - end) / 20) ** 0.5)
    assert wilson(0, 7)[0] == 0
    assert wilson(7, 7)[1] == 1
    assert wilson(7, 7)[0] == pytest.approx(1 - wilson(0, 7)[1])


def test_table():
    cells = (cell(256, 0.0, 4, 4), cell(256, 0.5, 1, 4), cell(1024, 0.0, 0, 4), cell(1024, 0.5, 2, 4))
    result = RetrievalResult("passkey", 0.125, {}, cells)
    assert result.accuracy == 7 / 16
    assert result.accuracy_at(256) == 5 / 8
    low, high = wilson(7, 16)
    assert [line.split() for line in str(result).splitlines()[1:4]] == [
        ["length", "0", "0.5", "all"],
        ["256", "1.00", "0.25", "0.62"],
        ["1024", "0.00", "0.50", "0.25"],
    ]
    assert str(result).endswith(f"overall 0.438 ({low:.3f} to {high:.3f} at 95 %); guessing finds 0.125")


def test_a_grid_is_sorted_and_has_no_doubles():
    jobs = grid([64, 32, 64], [1, 0.5, 1.0], 2)
    assert jobs == [Job(length, depth, trial) for length in (32, 64) for depth in (0.5, 1.0) for trial in (0, 1)]
    assert all(isinstance(job.depth, float) for job in jobs)


def test_random_numbers_are_each_jobs_own():
    jobs = grid([32, 64], [0, 0.5], 3)
    drawn = [job.random(seed).random() for job in jobs for seed in (0, 1)]
    assert len(set(drawn)) == len(drawn)
    assert drawn == [job.random(seed).random() for job in jobs for seed in (0, 1)]


@pytest.mark.parametrize(
    ("lengths", "depths", "trials", "message"),
    [
        ([], [0.5], 1, "lengths="),
        ([1], [0.5], 1, "lengths="),
        ([64.0], [0.5], 1, "lengths="),
        ([64], [], 1, "depths="),
        ([64], [-0.1], 1, "depths="),
        ([64], [1.01], 1, "depths="),
        ([64], [float("nan")], 1, "depths="),
        ([64], ["0.5"], 1, "depths="),
        ([64], [True], 1, "depths="),
        ([64], [0.5], 0, "trials=0: expected a whole number of 1 or more"),
        ([64], [0.5], 1.5, "trials=1.5"),
        ([64], [0.5], True, "trials=True"),
    ],
)
def test_refusals(lengths, depths, trials, message):
    with pytest.raises(PatchError, match=message):
        grid(lengths, depths, trials)


def test_outcomes_are_counted_in_their_cells():
    seen = []

    def score(batch):
        seen.append([job.length for job in batch])
        return [(int(job.trial == 0) + int(job.depth == 1), 2) for job in batch]

    jobs = grid([10, 30], [0, 1], 3)
    result = run_grid("t", tiny("llama"), jobs, score, chance=0.5, settings={"seed": 3}, batch_tokens=40)
    assert [(each.length, each.depth, each.correct, each.trials) for each in result.cells] == [
        (10, 0, 1, 6),
        (10, 1, 4, 6),
        (30, 0, 1, 6),
        (30, 1, 4, 6),
    ]
    assert seen == [[10] * 4, [10] * 2] + [[30]] * 6
    assert (result.task, result.chance, result.settings) == ("t", 0.5, {"seed": 3})
    assert all((each.low, each.high) == wilson(each.correct, 6) for each in result.cells)
    json.dumps(asdict(result))


def test_a_cell_does_not_depend_on_the_others():
    model = tiny("llama")
    whole = key_value(model, [32, 40, 64], depths=[0, 0.25, 1], trials=12)
    assert len({each.correct for each in whole.cells}) > 2
    for each in whole.cells:
        assert key_value(model, [each.length], depths=[each.depth], trials=12).cells == (each,)
    assert key_value(model, [32, 40, 64], depths=[0, 0.25, 1], trials=12, seed=1).cells != whole.cells


def test_stock_dynamic_rope_does_not_remember_an_earlier_grid():
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}
    config = AutoConfig.for_model(
        "llama",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.5,
        rope_parameters=rope,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    rows, forward = [], model.forward

    def keep(**kwargs):
        rows.append(forward(**kwargs))
        return rows[-1]

    model.forward = keep
    key_value(model, [40], depths=[0.5], trials=2)
    key_value(model, [300], depths=[0.5], trials=2)
    key_value(model, [40], depths=[0.5], trials=2)
    first, _, last = (row.logits for row in rows)
    assert torch.equal(first, last)


@pytest.mark.parametrize("model_type", ["llama", "codegen"])  # hfpos knows no codegen
def test_every_module_gets_its_mode_back(model_type):
    model = tiny(model_type).train()
    list(model.modules())[5].eval()
    before = [module.training for module in model.modules()]
    jobs = grid([32], [0.5], 1)
    in_eval = []

    def score(batch):
        in_eval.append(any(module.training for module in model.modules()) or torch.is_grad_enabled())
        raise KeyError

    with pytest.raises(KeyError):
        run_grid("t", model, jobs, score, chance=0, settings={})
    assert in_eval == [False]
    assert [module.training for module in model.modules()] == before


def test_progress_goes_to_stderr(capsys):
    key_value(tiny("llama"), [32], depths=[0.5], trials=1, progress=True)
    shown = capsys.readouterr()
    assert "key_value" in shown.err
    assert shown.out == ""
    key_value(tiny("llama"), [32], depths=[0.5], trials=1)
    shown = capsys.readouterr()
    assert shown.err == shown.out == ""
