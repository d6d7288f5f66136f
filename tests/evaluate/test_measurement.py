"""What may go wrong in a long run: memory, bad documents, a kill; and what must not change the numbers."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import hfpos
from hfpos.evaluate import Skipped, perplexity
from tests.tiny import tiny


def documents(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, (size,), generator=generator).tolist() for size in sizes]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    torch.OutOfMemoryError("HIP ran out"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    MemoryError(),
]


def model_out_of_memory_above(rows, error=OUT_OF_MEMORY[0]):
    """A model that has room for so many rows, and what batch sizes it was asked for."""
    model, asked = tiny("llama", vocab_size=96), []

    def before(module, args, kwargs):
        asked.append(kwargs["input_ids"].shape[0])
        if asked[-1] > rows:
            raise error

    model.register_forward_pre_hook(before, with_kwargs=True)
    return model, asked


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
@pytest.mark.parametrize("stride", [None, 8])
def test_auto_batch_halves_and_goes_on(stride, error):
    rows = documents(*[40] * 11)
    expected = perplexity(tiny("llama", vocab_size=96), rows, [20, 40], stride and 8, batch_size=1)
    model, asked = model_out_of_memory_above(3, error)
    found = perplexity(model, rows, [20, 40], stride)
    assert max(asked) > 3
    assert asked[-1] <= 3
    for length, scored in expected.by_length.items():
        assert found.by_length[length].tokens == scored.tokens
        assert found.by_length[length].nll == pytest.approx(scored.nll, rel=1e-6)


def test_out_of_memory_that_cannot_be_helped():
    rows = documents(40, 40)
    with pytest.raises(hfpos.PatchError, match="1 x 40 tokens.*smaller chunk"):
        perplexity(model_out_of_memory_above(0)[0], rows, [40])
    with pytest.raises(hfpos.PatchError, match='2 x 40 tokens.*batch_size="auto"'):
        perplexity(model_out_of_memory_above(1)[0], rows, [40], batch_size=2)


def nan_on(token):
    """A model that makes nothing of one token."""
    model = tiny("llama", vocab_size=96)

    def after(module, args, kwargs, output):
        kept = output.logits.shape[1]
        output.logits[kwargs["input_ids"][:, -kept:] == token] = float("nan")

    model.register_forward_hook(after, with_kwargs=True)
    return model


def test_a_loss_that_is_not_finite_names_document_window_and_token():
    rows = documents(50, 50)
    rows[1][23] = 95
    with pytest.raises(
        hfpos.PatchError, match=r"document 1: the loss of token 24 in the window of tokens 0 to 50 is nan"
    ):
        perplexity(nan_on(95), rows, [20, 50])
    with pytest.raises(
        hfpos.PatchError, match=r"document 1: the loss of token 24 in the window of tokens 10 to 30 is nan"
    ):
        perplexity(nan_on(95), rows, [20], 10)


def test_skip_bad_leaves_bad_documents_out_and_lists_them():
    good = documents(50, 50)
    overflowing = [*good[0][:30], 95, *good[0][31:]]
    bad = [good[0], overflowing, good[1][:5], [1, 2, 3000], good[1], [[1, 2]]]
    result = perplexity(nan_on(95), bad, [10, 50], skip_bad=True)
    assert result.by_length == perplexity(nan_on(95), good, [10, 50]).by_length
    assert {skipped.document for skipped in result.skipped} == {f"document {i}" for i in (1, 2, 3, 5)}
    reasons = " ".join(skipped.reason for skipped in result.skipped)
    for part in ("is nan", "it has 5 tokens, the shortest length is 10", "0 to 95", "1-D"):
        assert part in reasons
    assert all(isinstance(skipped, Skipped) for skipped in result.skipped)
    with pytest.raises(hfpos.PatchError, match="every document of length 50 was skipped"):
        perplexity(nan_on(95), [overflowing], [50], skip_bad=True)


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    model, rows, runs = tiny("llama", vocab_size=96), documents(60, 50, 40, 30), []
    expected = perplexity(model, rows, [20, 30], 10)

    def count(module, args, kwargs):
        runs.append(tuple(kwargs["input_ids"].shape))
        if len(runs) == 12:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        perplexity(model, rows, [20, 30], 10, batch_size=1, resume=tmp_path)
    journal = next(tmp_path.iterdir())
    done = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines() if line]
    assert 0 < len(done) < len(rows)
    journal.write_text(journal.read_text(encoding="utf-8") + '\n{"document": "torn', encoding="utf-8")

    runs[:] = [()] * 12
    assert perplexity(model, rows, [20, 30], 10, batch_size=1, resume=tmp_path) == expected
    rerun = len(runs) - 12
    runs[:] = [()] * 12
    assert perplexity(model, rows, [20, 30], 10, batch_size=1) == expected
    assert rerun < len(runs) - 12
    runs[:] = [()] * 12
    assert perplexity(model, rows, [20, 30], 10, batch_size=1, resume=tmp_path) == expected
    assert len(runs) == 12  # nothing is run a third time
    hook.remove()


def test_the_journal_is_of_one_model_scheme_and_protocol(tmp_path):
    model, rows = tiny("llama", vocab_size=96), documents(60)
    perplexity(model, rows, [30], resume=tmp_path)
    for other, arguments in (
        (tiny("llama", vocab_size=96, seed=1), {}),
        (hfpos.patch(tiny("llama", vocab_size=96), "yarn", factor=4), {}),
        (tiny("llama", vocab_size=96), {"bos": "first", "bos_token_id": 1}),
        (tiny("llama", vocab_size=96), {"stride": 7}),
    ):
        before = perplexity(other, rows, [30], **arguments)
        assert perplexity(other, rows, [30], resume=tmp_path, **arguments) == before


def test_lengths_beyond_a_table_that_hfpos_has_no_family_for():
    model = tiny("openai-gpt", n_positions=64)
    with pytest.raises(hfpos.PatchError, match=r"64 learned positions \(.*positions_embed\), 80 were asked for"):
        perplexity(model, documents(80), [80])
    assert perplexity(model, documents(80), [64]).by_length[64].tokens == 63


def test_text_in_any_form(tmp_path):
    from datasets import Dataset

    from hfpos.data import train_tokenizer

    texts = [" ".join(f"{i} times {j} is {i * j}." for i in range(40)) for j in range(3)]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    model = tiny("llama", vocab_size=len(tokenizer))
    expected = perplexity(model, [tokenizer(text).input_ids for text in texts], [50, 100])
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    table = Dataset.from_dict({"text": texts, "ids": [tokenizer(text).input_ids for text in texts]})
    for source in (texts, tmp_path, str(tmp_path), table, table["text"]):
        found = perplexity(model, source, [50, 100], tokenizer=tokenizer)
        for length, scored in found.by_length.items():
            assert scored.nll == pytest.approx(expected.by_length[length].nll, rel=1e-9)
            assert scored.bits_per_byte > 0
    assert perplexity(model, table["ids"], [50, 100]) == expected
    with pytest.raises(hfpos.PatchError, match="tokenizer"):
        perplexity(model, texts, [50])


def test_the_model_comes_back_as_it_was():
    model = AutoModelForCausalLM.from_config(tiny("llama", vocab_size=96).config).train()
    perplexity(model, documents(30), [30])
    assert all(module.training for module in model.modules())
