"""LongRoPE's search: how much to slow each rotary frequency down, found by measuring."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from hfpos.data.documents import digest
from hfpos.evaluate.arguments import bos_id
from hfpos.evaluate.journal import fingerprint
from hfpos.evaluate.processes import is_main
from hfpos.evaluate.windows import Bos
from hfpos.scheme import Geometry, PatchError
from hfpos.schemes.longrope import LongRope
from hfpos.search.evolution import Generation, Settings, evolve
from hfpos.search.factors import HEADROOM, Factors, starts
from hfpos.search.fitness import Fitness, long_documents, rotary_geometry
from hfpos.search.journal import Journal
from hfpos.search.result import SearchResult
from hfpos.version import __version__


def search(
    model: nn.Module,
    documents: Any,
    target_length: int,
    *,
    original_length: int | None = None,
    attention_factor: float | None = None,
    population: int = 64,
    iterations: int = 40,
    mutations: int = 16,
    crossovers: int = 16,
    parents: int = 32,
    mutation_probability: float = 0.3,
    seed: int = 0,
    bos: Bos = "none",
    bos_token_id: int | None = None,
    tokenizer: Any = None,
    batch_size: int | Literal["auto"] = "auto",
    chunk: int | None = None,
    resume: str | Path | None = None,
    progress: bool = False,
) -> SearchResult:
    """Search LongRoPE's divisors of the rotary frequencies: those with the lowest perplexity at `target_length`.

    Paper: arXiv 2402.13753, sections 3.1 and 3.2, and its defaults. The first generation holds the frequencies of PI, NTK and YaRN and
    mutations of them; each later one mutations and crossovers of the best candidates so far. Divisors never fall from one frequency to
    the next slower one, and lie between 1 and 1.25 x target / original length, 0.01 apart. A mutation draws a divisor between its two
    neighbours, as the authors' code does; a crossover takes each from one of two parents and puts them in order.

    Two things of the paper are left out. The first tokens are not exempt from the rescaling (its n-hat): stock `longrope` cannot say
    that. And no second search is made for short texts: `short_factor` is all ones, the model as it was, and not in use in the patch
    that is measured and written (`cache="pinned"`), which has one set of frequencies at every length, so that stock Transformers
    loads it and decodes as it prefills. With `cache="exact"` short texts keep their frequencies.

    Under `accelerate launch` the documents are divided among the processes, and all of them return the same result.

    Args:
        model: a Transformers causal language model with rotary embeddings, or a wrapper around one; it comes out as it went in. A scheme
            that it is patched with is replaced for the time of the search.
        documents: as for `hfpos.evaluate.perplexity`, each of at least `target_length` tokens, of which the first are read. A handful
            is enough; not those that the result will be judged by.
        target_length: tokens to extend to, more than the original length.
        original_length: tokens of the pretraining; read from the model unless given.
        attention_factor: the factor on cos and sin of every candidate; `sqrt(1 + ln(s) / ln(original))` unless given.
        population, iterations, mutations, crossovers, parents, mutation_probability, seed: see `hfpos.search.evolution.Settings`.
        bos, bos_token_id, tokenizer, batch_size, chunk: as for `hfpos.evaluate.perplexity`.
        resume: folder of a journal of measured candidates; a search that was killed goes on from there.
        progress: show a progress bar on stderr.

    Raises:
        PatchError: no rotary embeddings, a target that is not beyond the original length, documents that are too short, a journal of
            another search, ...

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
    ...                      max_position_embeddings=16)
    >>> result = search(LlamaForCausalLM(config), [list(range(32))], 32, population=8, iterations=1)
    >>> len(result.long_factor), result.perplexity["best"][32] <= result.perplexity["yarn"][32]
    (4, True)
    """
    settings = Settings(
        population=population,
        iterations=iterations,
        mutations=mutations,
        crossovers=crossovers,
        parents=parents,
        mutation_probability=mutation_probability,
        seed=seed,
    )
    geometry = rotary_geometry(model)
    scheme, lengths = _scheme(geometry, target_length, original_length, attention_factor)
    bos_token = bos_id(model, bos, bos_token_id)
    rows = long_documents(model, documents, tokenizer, target_length, bos_token)
    protocol = {"bos": bos, "bos_token_id": bos_token_id, "batch_size": batch_size, "chunk": chunk}
    fitness = Fitness(model, rows, scheme, lengths, protocol)
    data, model_hash = digest(rows), fingerprint(model)
    about = {
        "hfpos": __version__,
        "model": model_hash,
        "data": data,
        "lengths": list(lengths),
        "attention_factor": scheme.attention_factor,
        "bos": [bos, bos_token],
    }
    begun = starts(geometry, *lengths)
    fitness.prove(begun["pi"])
    journal = Journal(resume, about)
    best, history = _evolve(fitness, journal, begun, settings, progress)
    return SearchResult(
        long_factor=best,
        short_factor=tuple(scheme.short_factor),
        attention_factor=float(scheme.attention_factor),  # type: ignore[arg-type]
        original_length=lengths[0],
        target_length=lengths[1],
        perplexity=fitness.table({**begun, "best": best}),
        as_schemes=fitness.as_schemes(),
        history=tuple(history),
        settings=settings,
        documents=len(rows),
        data_sha256=data,
        fingerprint=model_hash,
    )


def _scheme(
    geometry: Geometry, target_length: int, original_length: int | None, attention_factor: float | None
) -> tuple[LongRope, tuple[int, int]]:
    """What all candidates share, with nothing left to a default: what is written is what was measured. And both lengths."""
    ones = [1.0] * (geometry.rotary_dim // 2)
    scheme = LongRope(
        long_factor=ones,
        short_factor=ones,
        target_length=target_length,
        original_length=original_length,
        attention_factor=attention_factor,
        cache="pinned",
    )
    original = scheme.resolved_original(geometry)
    if target_length <= original:
        raise PatchError(
            f"search: target_length={target_length} is not beyond the original length {original}, where nothing needs to be slowed "
            "down; ask for a longer target"
        )
    scale = scheme.attention_scale(geometry)
    return dataclasses.replace(scheme, original_length=original, attention_factor=scale), (original, target_length)


def _evolve(
    fitness: Fitness, journal: Journal, begun: dict[str, Factors], settings: Settings, progress: bool
) -> tuple[Factors, list[Generation]]:
    """Run the evolution over what the journal knows and what has to be measured."""
    original, target = fitness.lengths
    columns = (
        TextColumn("searching"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("lowest perplexity {task.fields[lowest]:.4f}"),
    )
    lowest = float("inf")
    with Progress(*columns, console=Console(stderr=True), disable=not (progress and is_main())) as bar:
        task = bar.add_task("searching", total=settings.candidates, lowest=lowest)

        def measure(factors: Factors) -> float:
            nonlocal lowest
            if factors not in journal.known:
                journal.add(factors, fitness(factors))
            lowest = min(lowest, journal.known[factors])
            bar.update(task, advance=1, lowest=lowest)
            return journal.known[factors]

        return evolve(begun.values(), measure, HEADROOM * target / original, settings)
