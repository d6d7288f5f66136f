"""The command `hfpos search`. Options are the library's arguments."""

# What is slow to import is imported where it is used, so that `hfpos --help` answers at once.
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfpos.evaluate import options
from hfpos.scheme import PatchError


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the `hfpos` command."""
    app.command()(search)


def parse_length(text: str) -> int:
    """One context length; k is 1,024.

    >>> parse_length("32k")
    32768
    """
    lengths = options.parse_lengths(text)
    if len(lengths) != 1:
        raise PatchError(f"{text!r} is {len(lengths)} lengths; expected one, e.g. 32k")
    return lengths[0]


def search(
    model: options.Model,
    target: Annotated[
        Any, typer.Option(parser=parse_length, metavar="TOKENS", help="Length to extend to, e.g. 32k (k = 1,024).")
    ],
    data: options.Text,
    original_length: Annotated[
        Any,
        typer.Option(parser=parse_length, metavar="TOKENS", help="Of the pretraining; the model's own unless given."),
    ] = None,
    attention_factor: Annotated[
        float | None, typer.Option(help="The factor on cos and sin; sqrt(1 + ln(s) / ln(original)) unless given.")
    ] = None,
    population: Annotated[int, typer.Option(help="Candidates of the first generation.")] = 64,
    iterations: Annotated[int, typer.Option(help="Generations after the first.")] = 40,
    mutations: Annotated[int, typer.Option(help="New candidates of each, changed from one of the best.")] = 16,
    crossovers: Annotated[int, typer.Option(help="New candidates of each, mixed from two of the best.")] = 16,
    parents: Annotated[int, typer.Option(help="How many count as the best.")] = 32,
    mutation_probability: Annotated[float, typer.Option(help="Of each frequency, in a mutation.")] = 0.3,
    seed: options.Seed = 0,
    data_split: options.Split = None,
    text_column: options.Column = "text",
    min_tokens: options.MinTokens = 0,
    blocks: Annotated[
        bool,
        typer.Option("--blocks", help="Cut documents into blocks of the target length, each a document of its own."),
    ] = False,
    max_documents: options.MaxDocuments = None,
    data_seed: options.DrawSeed = None,
    bos: options.Bos = "none",
    bos_token_id: options.BosId = None,
    batch_size: options.BatchSize = "auto",
    chunk: options.Chunk = None,
    dtype: options.Dtype = "auto",
    save: Annotated[Path | None, typer.Option(help="Write the model with the factors found to this folder.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for longrope.json, search.json and the journal.")] = Path(
        "hfpos-search"
    ),
) -> None:
    """Search LongRoPE's factors for a model and a length.

    Measures many candidates on the text and writes the best as parameters of the scheme `longrope`. A run that was killed goes on where it
    was when the same command is given again.
    """
    from hfpos.evaluate.load import load_model, load_text
    from hfpos.evaluate.processes import is_main
    from hfpos.search import search as run

    _refuse_full(save)
    loaded, tokenizer = load_model(model, dtype)
    documents = load_text(
        data,
        tokenizer,
        model,
        split=data_split,
        text_column=text_column,
        min_tokens=min_tokens,
        block_tokens=target - (bos != "none") if blocks else None,
        max_documents=max_documents,
        seed=data_seed,
    )
    result = run(
        loaded,
        documents,
        target,
        original_length=original_length,
        attention_factor=attention_factor,
        population=population,
        iterations=iterations,
        mutations=mutations,
        crossovers=crossovers,
        parents=parents,
        mutation_probability=mutation_probability,
        seed=seed,
        bos=bos,
        bos_token_id=bos_token_id,
        batch_size=batch_size,
        chunk=chunk,
        resume=out,
        progress=True,
    )
    if is_main():
        _write(loaded, tokenizer, model, documents, result, out, save)


def _refuse_full(folder: Path | None) -> None:
    """Before the hours of a search, not after them."""
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PatchError(f"{folder} exists and is not an empty folder; choose another one for --save")


def _write(model: Any, tokenizer: Any, name: str, documents: Any, result: Any, out: Path, save: Path | None) -> None:
    """Print what was found and write it."""
    from hfpos.describe import describe
    from hfpos.evaluate.load import without_loading_bars
    from hfpos.patching import language_model, patch
    from hfpos.report.provenance import provenance
    from hfpos.report.results import Data
    from hfpos.search.result import SearchRecord, write

    dtype = str(language_model(model).dtype).removeprefix("torch.")
    path = write(SearchRecord(name, dtype, Data.of(documents), result, provenance()), out)
    typer.echo(result)
    typer.echo(f"The factors as a scheme: {path}. All numbers: {path.with_name('search.json')}")
    if save is None:
        return
    patch(model, "longrope", tokenizer=tokenizer, **result.parameters)
    with without_loading_bars():
        model.save_pretrained(save)
    tokenizer.save_pretrained(save)
    loads = "stock Transformers loads it" if describe(model).stock_loadable else "load it with hfpos.from_pretrained"
    typer.echo(f"The model with these factors: {save} ({loads})")
