"""One model under several positional schemes, on the same text, measured the same way; patched and unpatched in place."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import nn

from hfpos.data.documents import DocumentSet, digest
from hfpos.describe import Description, describe
from hfpos.evaluate.arguments import bos_id, check_documents, check_lengths, size_with_bos, strides
from hfpos.evaluate.attention_profile import AttentionProfile, attention_profile
from hfpos.evaluate.journal import fingerprint
from hfpos.evaluate.pattern import pattern, wavelengths
from hfpos.evaluate.perplexity import perplexity
from hfpos.evaluate.processes import is_main
from hfpos.evaluate.result import PerplexityResult, Skipped
from hfpos.evaluate.retrieval import RetrievalResult
from hfpos.evaluate.scheme_list import REFERENCE, Entry, entries
from hfpos.evaluate.windows import Bos
from hfpos.patching import language_model, patched, record_of
from hfpos.report.provenance import provenance
from hfpos.report.results import Comparison, Data, ModelInfo, Protocol, Results, Run
from hfpos.scheme import PatchError, Scheme


Probe = Callable[[nn.Module], RetrievalResult]


def compare(
    model: nn.Module,
    documents: Any,
    schemes: str | list[str | Scheme],
    lengths: Sequence[int],
    *,
    factor: float | None = None,
    stride: int | Literal["window"] | None = None,
    bos: Bos = "none",
    bos_token_id: int | None = None,
    aggregate: Literal["tokens", "windows"] = "tokens",
    tolerance: float = 0.01,
    retrieval: Sequence[Probe] = (),
    attention: int | None = None,
    tokenizer: Any = None,
    batch_size: int | Literal["auto"] = "auto",
    chunk: int | None = None,
    skip_bad: bool = False,
    resume: str | Path | None = None,
    seed: int = 0,
    name: str | None = None,
    progress: bool = False,
) -> Results:
    """Measure one model under several schemes, the unpatched model first.

    Every length is measured on the same documents: those shorter than the longest length are left out, and listed. If no length up to the
    model's trained one is asked for, the trained length is added, so that what a scheme costs there stands beside what it gains.

    Args:
        model: a Transformers causal language model or a wrapper around one; it comes out as it went in.
        documents, stride, bos, bos_token_id, aggregate, tokenizer, batch_size, chunk, skip_bad, resume, seed: as for `perplexity`.
        schemes: names, e.g. "linear,yarn(beta_fast=16)", or a list of names and scheme objects. "none" is the model as it is and always measured.
        lengths: context lengths in tokens.
        factor: how far to extend, for schemes that have to be told; longest / trained length unless given.
        tolerance: for the effective context: how much worse than the best shorter length still counts as held.
        retrieval: tests to run under every scheme, each `model -> RetrievalResult`.
        attention: measure where attention looks, too, in so many tokens of the first documents (see `attention_profile`).
        name: what the model is called in the results; its class unless given.
        progress: show what is running on stderr.

    Raises:
        PatchError: bad arguments, or the unpatched model cannot be measured. A scheme that does not fit the model, or breaks it, is no
            error: it stands in the results as refused, with the reason.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
    ...                      max_position_embeddings=16)
    >>> results = compare(LlamaForCausalLM(config), [list(range(32))], "linear,yarn", lengths=[16, 32])
    >>> [run.label for run in results.comparisons[0].runs]
    ['none', 'linear', 'yarn']
    """
    found = describe(model)
    wanted = check_lengths(lengths)
    chosen = entries(schemes, factor, found.trained_length, wanted[-1])
    if len(chosen) > 1:
        wanted = _with_trained(wanted, found.trained_length)
    strides(stride, wanted)
    bos_token = bos_id(model, bos, bos_token_id)
    data = _same_documents(model, documents, tokenizer, wanted, bos_token, skip_bad)
    info = _model_info(model, found, name)

    def measure(lengths: list[int]) -> PerplexityResult:
        return perplexity(
            model,
            data.documents,
            lengths,
            stride,
            bos=bos,
            bos_token_id=bos_token_id,
            aggregate=aggregate,
            batch_size=batch_size,
            chunk=chunk,
            skip_bad=skip_bad,
            resume=resume,
            seed=seed,
            progress=progress,
        )

    def look(reach: int | None) -> AttentionProfile | None:
        return (
            None if attention is None else attention_profile(model, data.documents, min(attention, reach or attention))
        )

    runs: list[Run] = []
    refused: dict[str, str] = {}
    console = Console(stderr=True, quiet=not (progress and is_main()))
    for entry in chosen:
        console.print(f"{entry.label} ...", markup=False, highlight=False)
        try:
            runs.append(_run(model, entry, measure, wanted, found, retrieval, look))
        except PatchError as error:
            if entry.label == REFERENCE:
                raise
            refused[entry.label] = str(error)
            console.print(f"{entry.label} is left out: {error}", markup=False, highlight=False)
    protocol = Protocol(tuple(wanted), stride, bos, bos_token, aggregate, tolerance, seed)
    return Results((_comparison(info, protocol, data, runs, refused),))


def measured_alone(
    model: nn.Module,
    result: PerplexityResult,
    documents: DocumentSet,
    lengths: Sequence[int],
    stride: int | Literal["window"] | None,
    *,
    bos: Bos,
    bos_token_id: int | None,
    aggregate: str,
    tolerance: float,
    seed: int,
    name: str,
) -> Results:
    """What `perplexity` found, in the schema of a comparison with nothing to compare; the arguments are those it was called with."""
    found = describe(model)
    wanted = check_lengths(lengths)
    run = Run(
        label=REFERENCE,
        scheme=REFERENCE,
        parameters=found.parameters,
        needs_training=found.needs_training,
        perplexity=result,
        wavelengths=wavelengths(model, wanted[-1]),
        pattern=pattern(model, wanted[-1]),
    )
    protocol = Protocol(tuple(wanted), stride, bos, bos_id(model, bos, bos_token_id), aggregate, tolerance, seed)
    return Results((_comparison(_model_info(model, found, name), protocol, documents, [run], {}),))


def _comparison(
    info: ModelInfo, protocol: Protocol, documents: DocumentSet, runs: list[Run], refused: dict[str, str]
) -> Comparison:
    bad = [skipped for run in runs if run.perplexity for skipped in run.perplexity.skipped]
    return Comparison(info, protocol, Data.of(documents, bad), tuple(runs), refused, provenance())


def _run(
    model: nn.Module,
    entry: Entry,
    measure: Callable[[list[int]], PerplexityResult],
    lengths: list[int],
    unpatched: Description,
    retrieval: Sequence[Probe],
    look: Callable[[int | None], AttentionProfile | None],
) -> Run:
    """Measure the model under one scheme."""
    start = time.perf_counter()
    if entry.scheme is None:
        lengths = unpatched.within_table(lengths)
    with contextlib.nullcontext() if entry.scheme is None else patched(model, entry.scheme):
        found = describe(model)
        return Run(
            label=entry.label,
            scheme=REFERENCE if entry.scheme is None else entry.scheme.name,
            parameters=found.parameters,
            needs_training=found.needs_training,
            profile=look(found.table_length),
            perplexity=measure(lengths),
            retrieval=tuple(test(model) for test in retrieval),
            wavelengths=wavelengths(model, lengths[-1]),
            pattern=pattern(model, lengths[-1]),
            seconds=round(time.perf_counter() - start, 2),
        )


def _with_trained(lengths: list[int], trained: int | None) -> list[int]:
    if trained is None or lengths[0] <= trained:
        return lengths
    return [trained, *lengths]


def _same_documents(
    model: nn.Module, documents: Any, tokenizer: Any, lengths: list[int], bos_token: int | None, skip_bad: bool
) -> DocumentSet:
    """The documents that reach the longest length, with the record of where they are from."""
    vocabulary = language_model(model).config.get_text_config().vocab_size
    rows, skipped = check_documents(documents, tokenizer, vocabulary, skip_bad)
    long, short = [], []
    for row in rows:
        size = size_with_bos(row, bos_token)
        if size >= lengths[-1]:
            long.append(row)
        else:
            short.append(Skipped(row.name, f"it has {size:,} tokens, fewer than the longest length"))
    if not long:
        longest = max(size_with_bos(row, bos_token) for row in rows)
        raise PatchError(
            f"no document reaches length {lengths[-1]}: the longest has {longest} tokens. Ask for shorter lengths, or give longer documents"
        )
    whole = documents if isinstance(documents, DocumentSet) else None
    return DocumentSet(
        documents=long,
        source=whole.source if whole else "token ids",
        sha256=digest(long),
        skipped=(*skipped, *short),
        preparation=whole.preparation if whole else {},
    )


def _model_info(model: nn.Module, found: Description, name: str | None) -> ModelInfo:
    target = language_model(model)
    record = record_of(target)
    weights = {id(weight): weight.numel() for weight in model.parameters()}
    return ModelInfo(
        path=name or type(target).__name__,
        class_name=type(target).__name__,
        family=found.family,
        native_scheme=found.scheme if record is None else str(record.scheme),
        parameters=sum(weights.values()),
        dtype=str(target.dtype).removeprefix("torch."),
        device=str(next(target.parameters()).device),
        trained_length=found.trained_length,
        fingerprint=fingerprint(model),
    )
