"""Perplexity of a causal model against context length, every token scored once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from torch import nn

from hfpos.data.documents import TokenizedDocument
from hfpos.describe import describe
from hfpos.evaluate.arguments import (
    begins_with,
    bos_id,
    check_choices,
    check_documents,
    check_lengths,
    check_reach,
    depends_on_length,
    strides,
)
from hfpos.evaluate.journal import Journal, Tallies, digest, fingerprint
from hfpos.evaluate.measurement import Measurement
from hfpos.evaluate.processes import gather, is_main, is_sharded, local, share
from hfpos.evaluate.result import PerplexityResult, Skipped
from hfpos.evaluate.scoring import TokenScorer
from hfpos.evaluate.tally import bucket_edges, score
from hfpos.evaluate.windows import Bos, Window, sliding, truncated
from hfpos.patching import language_model
from hfpos.probe import eval_mode
from hfpos.scheme import PatchError
from hfpos.version import __version__


def perplexity(
    model: nn.Module,
    documents: Any,
    lengths: Sequence[int],
    stride: int | Literal["window"] | None = None,
    *,
    bos: Bos = "none",
    bos_token_id: int | None = None,
    aggregate: Literal["tokens", "windows"] = "tokens",
    tokenizer: Any = None,
    batch_size: int | Literal["auto"] = "auto",
    chunk: int | None = None,
    skip_bad: bool = False,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> PerplexityResult:
    """Measure the perplexity of a model at several context lengths.

    The perplexity is exp(sum of negative log-likelihoods / tokens scored), over all documents of at least L tokens; shorter ones do
    not count for that L. A token with nothing before it is not scored.

    With `stride=None` (the truncated protocol), the first L tokens of each document are read. A causal model whose positions do not depend
    on the total length is run once per document, at the longest length, and every shorter one is a prefix sum of that run. A model whose
    positions do depend on it (`dynamic` or `longrope` as stock Transformers has them, `cache="pinned"`) is run once per length.
    With a stride, windows of L tokens slide over each whole document; each token is scored once, in the first window that holds it.

    Under `accelerate launch` the documents are divided among the processes, and each of them returns the whole result.

    Args:
        model: a Transformers causal language model, patched or not, or a wrapper around one (PEFT). It is put in eval mode for the
            measurement.
        documents: token ids, one list or 1-D tensor a document; or what `hfpos.data.load_documents` returns; or, with `tokenizer`,
            anything it reads: a text file, JSON lines, a folder, a data set or its text column, a list of texts.
        lengths: context lengths in tokens, 2 or more, BOS included.
        stride: tokens by which the window moves, at most the shortest length; "window" for disjoint windows; None for no windows.
        bos: "every-window" puts the BOS token in front of every window, "first" of each document, unless it stands there; "none" scores
            the ids as they are given.
        bos_token_id: default: the one in the model's config.
        aggregate: "tokens" weighs every token alike. "windows" gives exp(mean of the windows' mean losses), as older published tables have it.
        tokenizer: the model's, for documents that are text.
        batch_size: rows run together; "auto" starts high and halves when memory runs out. It changes speed and memory, not the result.
        chunk: tokens that go through the model at a time, the earlier ones read from the KV cache; chosen by length unless given.
        skip_bad: go on past documents that are too short, have foreign ids or a loss that is not finite; they are listed in the result.
        resume: folder of a journal; documents finished in an earlier, killed run of the same measurement are not run again.
        seed: of the bootstrap for the standard error.
        progress: show a progress bar on stderr.

    Raises:
        PatchError: a length no document reaches or the model cannot take, ids outside the vocabulary, a loss that is not finite, ...

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    ... )
    >>> result = perplexity(LlamaForCausalLM(config), [range(32), range(16)], lengths=[8, 32])
    >>> [(length, score.tokens, score.documents) for length, score in result.by_length.items()]
    [(8, 14, 2), (32, 31, 1)]
    """
    check_choices(batch_size, chunk, bos, bos_token_id, aggregate)
    wanted = check_lengths(lengths)
    steps = strides(stride, wanted)
    bos_token = bos_id(model, bos, bos_token_id)
    language_model(model)  # a clear error where there is none
    model = local(model)
    every_length = depends_on_length(model, wanted[-1])
    with eval_mode(model):
        scorer = TokenScorer(model, chunk, every_length)
        rows, skipped = check_documents(documents, tokenizer, scorer.vocabulary, skip_bad)
        rows, short = check_reach(rows, wanted, bos_token, skip_bad)
        plans = [_plan(row, wanted, steps, bos, bos_token, every_length) for row in rows]
        marks = [*wanted, *_trained_length(model)]
        edges = {length: bucket_edges(length, marks) for length in wanted}
        measurement = Measurement(scorer, rows, plans, edges, bos_token, batch_size, skip_bad)
        found, bad = _divided(measurement, resume, (edges, steps, bos, bos_token, every_length), progress)
    skipped += [*short, *bad]
    by_length = {}
    for length in wanted:
        tallies = [found[index][length] for index in sorted(found) if length in found[index]]
        if not tallies:
            raise PatchError(
                f"every document of length {length} was skipped; the first: {skipped[0].document}: {skipped[0].reason}"
            )
        by_length[length] = score(tallies, edges[length], aggregate, seed)
    return PerplexityResult(by_length, tuple(skipped))


def _divided(
    measurement: Measurement, resume: str | Path | None, protocol: tuple, progress: bool
) -> tuple[dict[int, Tallies], list[Skipped]]:
    """Run this process's share of the documents; everybody's tallies by document, and everybody's bad documents."""
    model = measurement.scorer.model
    if resume is not None and is_sharded(model):
        raise PatchError("resume= does not work for a model whose weights lie in shards; leave it out")
    process, processes = share(model)
    journal = Journal(resume, digest(__version__, fingerprint(model), protocol) if resume else "", process)
    sizes = [sum(window.tokens for window in plan) for plan in measurement.plans]
    # the longest first: memory runs out early, if it does
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    error = None
    try:
        with Progress(console=Console(stderr=True), disable=not (progress and is_main())) as bar:
            measurement.run(order[process::processes], journal, bar)
    except PatchError as caught:
        error = caught
    found = gather(list(measurement.found.items()), error, processes)
    return dict(found), gather(measurement.skipped, None, processes)


def _plan(
    row: TokenizedDocument,
    lengths: list[int],
    steps: dict[int, int] | None,
    bos: Bos,
    bos_token: int | None,
    every_length: bool,
) -> list[Window]:
    """The windows of one document."""
    begins = begins_with(row, bos_token)
    if steps is None:
        return truncated(len(row.ids), lengths, bos, begins, every_length)
    return [window for length, step in steps.items() for window in sliding(len(row.ids), length, step, bos, begins)]


def _trained_length(model: nn.Module) -> list[int]:
    try:
        length = describe(model).trained_length
    except PatchError:
        return []
    return [] if length is None else [length]
