"""The commands that write a report: `hfpos compare` and `hfpos report`. Options are the library's arguments."""

# What is slow to import is imported where it is used, so that `hfpos --help` answers at once.
from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from hfpos.evaluate import options
from hfpos.evaluate.scheme_list import REFERENCE
from hfpos.scheme import PatchError


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to the `hfpos` command."""
    app.command()(compare)
    app.command()(report)


def compare(
    models: Annotated[
        list[str], typer.Argument(help="Folders or hub names of models or PEFT adapters, or .gguf files.")
    ],
    lengths: options.Lengths,
    data: options.Text,
    schemes: Annotated[
        str, typer.Option(help="e.g. none,linear,yarn(beta_fast=16); `hfpos schemes` lists them.")
    ] = REFERENCE,
    factor: Annotated[
        float | None, typer.Option(help="How far to extend; longest / trained length unless given.")
    ] = None,
    stride: options.Stride = None,
    bos: options.Bos = "none",
    bos_token_id: options.BosId = None,
    aggregate: options.Aggregate = "tokens",
    retrieval: Annotated[str, typer.Option(help="Tests to run too: passkey, needle, key_value.")] = "",
    haystack: Annotated[str | None, typer.Option(help="Text for needle: a file, .jsonl(.gz) or folder.")] = None,
    depths: options.Depths = "0,0.25,0.5,0.75,1",
    trials: options.Trials = 5,
    attention: Annotated[
        int | None,
        typer.Option(help="Measure where attention looks, too, in so many tokens of the first documents."),
    ] = None,
    data_split: options.Split = None,
    text_column: options.Column = "text",
    min_tokens: options.MinTokens = 0,
    max_tokens: options.MaxTokens = None,
    blocks: options.Blocks = False,
    max_documents: options.MaxDocuments = None,
    data_seed: options.DrawSeed = None,
    batch_size: options.BatchSize = "auto",
    chunk: options.Chunk = None,
    skip_bad: options.SkipBad = False,
    tolerance: options.Tolerance = "1%",
    max_regression: options.MaxRegression = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    out: Annotated[Path, typer.Option(help="Folder for results.json, tables, pictures and index.html.")] = Path(
        "hfpos-compare"
    ),
) -> None:
    """Measure models under several schemes, on the same text, and write a report; without schemes, the models as they are.

    A run that was killed goes on where it was when the same command is given again.
    """
    from hfpos.evaluate.compare import compare as run
    from hfpos.evaluate.load import load_model, load_text
    from hfpos.evaluate.processes import is_main
    from hfpos.evaluate.retrieval_tests import chosen_tests
    from hfpos.evaluate.scheme_list import entries
    from hfpos.report.joint import distinct_names
    from hfpos.report.page import require_report
    from hfpos.report.results import Results

    require_report()
    entries(schemes, factor=factor or 2.0, trained=2, longest=4)  # a misspelt scheme fails before anything is loaded
    if len(set(models)) < len(models):
        raise PatchError(f"a model is given twice ({', '.join(models)}); name each once")
    titles = distinct_names(models) if len(models) > 1 else [""]
    comparisons = []
    for model, title in zip(models, titles, strict=True):
        loaded, tokenizer = load_model(model, dtype)
        tests = chosen_tests(
            retrieval, lengths, tokenizer=tokenizer, haystack=haystack, depths=depths, trials=trials, seed=seed
        )
        documents = load_text(
            data,
            tokenizer,
            model,
            split=data_split,
            text_column=text_column,
            min_tokens=min_tokens,
            max_tokens=max_tokens,
            block_tokens=max(lengths) - (bos != "none") if blocks else None,
            max_documents=max_documents,
            seed=data_seed,
            skip_bad=skip_bad,
        )
        found = run(
            loaded,
            documents,
            schemes,
            lengths,
            factor=factor,
            stride=stride,
            bos=bos,
            bos_token_id=bos_token_id,
            aggregate=aggregate,
            tolerance=tolerance,
            retrieval=tests,
            attention=attention,
            batch_size=batch_size,
            chunk=chunk,
            skip_bad=skip_bad,
            resume=out / "progress",
            seed=seed,
            name=model,
            progress=True,
        )
        comparisons += [dataclasses.replace(each, title=title) for each in found.comparisons]
    if is_main():
        _write(Results(tuple(comparisons)), out, max_regression, progress=out / "progress")


def report(
    files: Annotated[list[Path], typer.Argument(help="results.json files of `hfpos compare` or `hfpos eval ppl`.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("hfpos-report"),
    max_regression: options.MaxRegression = None,
) -> None:
    """Merge results into one report."""
    from hfpos.report.results import load, merge

    _write(merge([load(file) for file in files]), out, max_regression)


def _write(results: Any, out: Path, max_regression: float | None, progress: Path | None = None) -> None:
    """Write the report, and exit with code 1 where a scheme costs more at short context than allowed."""
    from hfpos.report.gate import regressions
    from hfpos.report.tables import markdown
    from hfpos.report.write import write_report

    paths = write_report(results, out)
    if progress is not None:
        shutil.rmtree(progress, ignore_errors=True)
    typer.echo(markdown(results))
    typer.echo(f"The page to read: {paths['html']}. All numbers: {paths['json']}")
    if max_regression is None:
        return
    found = [trade for comparison in results.comparisons for trade in regressions(comparison, max_regression)]
    for trade in found:
        typer.echo(f"short context got worse by more than {100 * max_regression:g} %: {trade}", err=True)
    if found:
        raise typer.Exit(1)
