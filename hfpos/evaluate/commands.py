"""The commands that measure: `hfpos eval ...`, `hfpos compare`, `hfpos report`, `hfpos lm-eval`. Options are the library's arguments."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from hfpos.scheme import PatchError


Model = Annotated[str, typer.Argument(help="Folder or hub name of a model or PEFT adapter, or a .gguf file.")]
Text = Annotated[
    str,
    typer.Option("--data", help="A text file, .jsonl(.gz), a folder, `stdlib`, or a data set for `datasets`."),
]
Lengths = Annotated[str, typer.Option(help="Context lengths in tokens, BOS included, e.g. 512,1k,2k (k = 1,024).")]
Split = Annotated[str | None, typer.Option(help="Split of the data set, e.g. test.")]
Column = Annotated[str, typer.Option(help="Field or column that holds the text.")]
MinTokens = Annotated[int, typer.Option(help="Leave shorter documents out.")]
MaxTokens = Annotated[int | None, typer.Option(help="Keep only the first so many tokens of each document.")]
Blocks = Annotated[
    bool, typer.Option("--blocks", help="Cut documents into blocks of the longest length, each a document of its own.")
]
MaxDocuments = Annotated[int | None, typer.Option(help="Measure only so many documents (or blocks).")]
DrawSeed = Annotated[int | None, typer.Option(help="Draw these at random with this seed; else the first ones.")]
Stride = Annotated[
    str | None,
    typer.Option(
        help="Slide windows by so many tokens, or `window` for disjoint ones; else each document's first tokens only."
    ),
]
BosWord = Literal["every-window", "first", "none"]
Bos = Annotated[
    BosWord, typer.Option(help="Where to put a BOS token: every-window, first (of each document) or none.")
]
BosId = Annotated[int | None, typer.Option(help="The BOS token; the model's own unless given.")]
AggregateWord = Literal["tokens", "windows"]
Aggregate = Annotated[AggregateWord, typer.Option(help="tokens, or windows for the mean of the windows' means.")]
BatchSize = Annotated[str, typer.Option(help="Rows run together; auto halves when memory runs out.")]
Chunk = Annotated[int | None, typer.Option(help="Tokens that go through the model at a time.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on past bad documents, and list them.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Of whatever is drawn.")]
Tolerance = Annotated[
    str, typer.Option(help="Effective context: how much worse than the best shorter length is still held.")
]
Depths = Annotated[str, typer.Option(help="Where the fact stands, from 0 (start) to 1 (end).")]
Trials = Annotated[int, typer.Option(help="Prompts for each length and depth.")]
Haystack = Annotated[str | None, typer.Option(help="Text to hide needles in: a file, .jsonl(.gz) or folder.")]

SCHEME_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
EVAL = typer.Typer(no_args_is_help=True, help="Measure one model: perplexity against length, and retrieval.")


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to the `hfpos` command."""
    app.add_typer(EVAL, name="eval")
    app.command()(compare)
    app.command()(report)
    app.command("lm-eval", context_settings=SCHEME_OPTIONS | {"help_option_names": []})(lm_eval)


@EVAL.command(context_settings=SCHEME_OPTIONS)
def ppl(
    context: typer.Context,
    model: Model,
    data: Text,
    lengths: Lengths,
    stride: Stride = None,
    bos: Bos = "none",
    bos_token_id: BosId = None,
    aggregate: Aggregate = "tokens",
    scheme: Annotated[
        str | None, typer.Option(help="Patch the model first; its parameters as further options.")
    ] = None,
    data_split: Split = None,
    text_column: Column = "text",
    min_tokens: MinTokens = 0,
    max_tokens: MaxTokens = None,
    blocks: Blocks = False,
    max_documents: MaxDocuments = None,
    data_seed: DrawSeed = None,
    batch_size: BatchSize = "auto",
    chunk: Chunk = None,
    skip_bad: SkipBad = False,
    tolerance: Tolerance = "1%",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    resume: Annotated[
        Path | None, typer.Option(help="Folder of a journal: a killed run goes on where it was.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every number to this JSON file.")] = None,
) -> None:
    """Perplexity against context length."""
    from hfpos.evaluate import perplexity
    from hfpos.evaluate.compare import measured_alone
    from hfpos.evaluate.processes import is_main
    from hfpos.report.results import save

    wanted, step, rows, held = parse(lengths), _stride(stride), _batch_size(batch_size), _share(tolerance)
    loaded, tokenizer = _patched(context, model, scheme, dtype)
    documents = _documents(
        data, tokenizer, model, wanted, bos, blocks,
        split=data_split, text_column=text_column, min_tokens=min_tokens, max_tokens=max_tokens,
        max_documents=max_documents, seed=data_seed, skip_bad=skip_bad,
    )  # fmt: skip
    protocol: dict[str, Any] = {"bos": bos, "bos_token_id": bos_token_id, "aggregate": aggregate, "seed": seed}
    result = perplexity(
        loaded, documents, wanted, step, **protocol,
        batch_size=rows, chunk=chunk, skip_bad=skip_bad, resume=resume, progress=True,
    )  # fmt: skip
    if not is_main():
        return
    typer.echo(result)
    typer.echo(
        f"effective context: {result.effective_context(held):,} tokens (within {held:.3g} of the best shorter one)"
    )
    if out is not None:
        save(measured_alone(loaded, result, documents, wanted, step, **protocol, tolerance=held, name=model), out)


def parse(lengths: str) -> list[int]:
    """Lengths of the command line."""
    from hfpos.evaluate.load import parse_lengths

    return parse_lengths(lengths)


@EVAL.command(context_settings=SCHEME_OPTIONS)
def passkey(
    context: typer.Context,
    model: Model,
    lengths: Lengths,
    depths: Depths = "0,0.25,0.5,0.75,1",
    trials: Trials = 5,
    scheme: Annotated[
        str | None, typer.Option(help="Patch the model first; its parameters as further options.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
) -> None:
    """The pass key test: a number hidden in filler."""
    from hfpos.evaluate import passkey as test

    wanted = parse(lengths)
    loaded, tokenizer = _patched(context, model, scheme, dtype)
    typer.echo(test(loaded, tokenizer, wanted, depths=_depths(depths), trials=trials, seed=seed, progress=True))


@EVAL.command(context_settings=SCHEME_OPTIONS)
def needle(
    context: typer.Context,
    model: Model,
    lengths: Lengths,
    haystack: Annotated[str, typer.Option(help="Text to hide needles in: a file, .jsonl(.gz) or folder.")],
    needles: Annotated[int, typer.Option(help="Facts to be found in each prompt.")] = 1,
    distractors: Annotated[int, typer.Option(help="Further facts of the same form that are not asked for.")] = 0,
    depths: Depths = "0,0.25,0.5,0.75,1",
    trials: Trials = 5,
    scheme: Annotated[
        str | None, typer.Option(help="Patch the model first; its parameters as further options.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
) -> None:
    """Needles in a haystack: facts hidden in your own text."""
    from hfpos.data import read_documents
    from hfpos.evaluate import needle as test

    wanted, text = parse(lengths), read_documents(haystack)
    loaded, tokenizer = _patched(context, model, scheme, dtype)
    found = test(
        loaded, tokenizer, text, wanted, depths=_depths(depths),
        needles=needles, distractors=distractors, trials=trials, seed=seed, progress=True,
    )  # fmt: skip
    typer.echo(found)


@EVAL.command("key-value", context_settings=SCHEME_OPTIONS)
def key_value(
    context: typer.Context,
    model: Model,
    lengths: Lengths,
    pairs: Annotated[int, typer.Option(help="Pairs of key and value in each context.")] = 8,
    depths: Depths = "0,0.25,0.5,0.75,1",
    trials: Trials = 20,
    scheme: Annotated[
        str | None, typer.Option(help="Patch the model first; its parameters as further options.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
) -> None:
    """Recall of random tokens: needs no language, and no tokenizer."""
    from hfpos.evaluate import key_value as test

    wanted = parse(lengths)
    loaded, _ = _patched(context, model, scheme, dtype)
    typer.echo(test(loaded, wanted, depths=_depths(depths), pairs=pairs, trials=trials, seed=seed, progress=True))


def compare(
    model: Model,
    schemes: Annotated[str, typer.Option(help="e.g. none,linear,yarn(beta_fast=16); `hfpos schemes` lists them.")],
    lengths: Lengths,
    data: Text,
    factor: Annotated[
        float | None, typer.Option(help="How far to extend; longest / trained length unless given.")
    ] = None,
    stride: Stride = None,
    bos: Bos = "none",
    bos_token_id: BosId = None,
    aggregate: Aggregate = "tokens",
    retrieval: Annotated[str, typer.Option(help="Tests to run too: passkey, needle, key_value.")] = "",
    haystack: Haystack = None,
    depths: Depths = "0,0.25,0.5,0.75,1",
    trials: Trials = 5,
    data_split: Split = None,
    text_column: Column = "text",
    min_tokens: MinTokens = 0,
    max_tokens: MaxTokens = None,
    blocks: Blocks = False,
    max_documents: MaxDocuments = None,
    data_seed: DrawSeed = None,
    batch_size: BatchSize = "auto",
    chunk: Chunk = None,
    skip_bad: SkipBad = False,
    tolerance: Tolerance = "1%",
    max_regression: Annotated[
        str | None,
        typer.Option(help="Exit with 1 if a scheme costs more than this at or below the trained length, e.g. 1%."),
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option(help="Folder for results.json, tables, pictures and index.html.")] = Path(
        "hfpos-compare"
    ),
) -> None:
    """Measure a model under several schemes and write a report.

    A run that was killed goes on where it was when the same command is given again.
    """
    from hfpos.evaluate.compare import compare as run
    from hfpos.evaluate.processes import is_main
    from hfpos.evaluate.retrieval_tests import chosen_tests
    from hfpos.report.page import require_report

    require_report()
    wanted, step, rows, held = parse(lengths), _stride(stride), _batch_size(batch_size), _share(tolerance)
    allowed = None if max_regression is None else _share(max_regression)
    _check_schemes(schemes)
    loaded, tokenizer = _patched(None, model, None, dtype)
    tests = chosen_tests(
        retrieval, wanted, tokenizer=tokenizer, haystack=haystack, depths=_depths(depths), trials=trials, seed=seed
    )
    documents = _documents(
        data, tokenizer, model, wanted, bos, blocks,
        split=data_split, text_column=text_column, min_tokens=min_tokens, max_tokens=max_tokens,
        max_documents=max_documents, seed=data_seed, skip_bad=skip_bad,
    )  # fmt: skip
    results = run(
        loaded, documents, schemes, wanted, factor=factor, stride=step, bos=bos, bos_token_id=bos_token_id,
        aggregate=aggregate, tolerance=held, retrieval=tests, batch_size=rows, chunk=chunk, skip_bad=skip_bad,
        resume=out / "progress", seed=seed, name=model, progress=True,
    )  # fmt: skip
    if not is_main():
        return
    _write(results, out)
    shutil.rmtree(out / "progress", ignore_errors=True)
    if allowed is not None:
        _gate(results, allowed)


def report(
    files: Annotated[list[Path], typer.Argument(help="results.json files of `hfpos compare`.")],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("hfpos-report"),
    max_regression: Annotated[
        str | None, typer.Option(help="Exit with 1 if a scheme costs more than this at or below the trained length.")
    ] = None,
) -> None:
    """Merge results into one report."""
    from hfpos.report.results import load, merge

    allowed = None if max_regression is None else _share(max_regression)
    results = merge([load(file) for file in files])
    _write(results, out)
    if allowed is not None:
        _gate(results, allowed)


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness, with the model type `hfpos`; all options are its own."""
    from hfpos.evaluate.harness import main

    main(context.args)


def _write(results: Any, out: Path) -> None:
    from hfpos.report.tables import markdown
    from hfpos.report.write import write_report

    paths = write_report(results, out)
    typer.echo(markdown(results))
    typer.echo(f"The page to read: {paths['html']}. All numbers: {paths['json']}")


def _gate(results: Any, allowed: float) -> None:
    """Exit with code 1 where a scheme costs more at short context than allowed."""
    from hfpos.report.gate import regressions

    found = [trade for comparison in results.comparisons for trade in regressions(comparison, allowed)]
    for trade in found:
        typer.echo(f"short context got worse by more than {100 * allowed:g} %: {trade}", err=True)
    if found:
        raise typer.Exit(1)


def _check_schemes(schemes: str) -> None:
    """A misspelt scheme fails before anything is loaded."""
    from hfpos.evaluate.scheme_list import entries

    entries(schemes, factor=2.0, trained=2, longest=4)


def _patched(context: typer.Context | None, model: str, scheme: str | None, dtype: str) -> tuple[Any, Any]:
    """The model, patched as the options say, and its tokenizer."""
    from hfpos.cli import scheme_parameters
    from hfpos.evaluate.load import load_model
    from hfpos.patching import patch
    from hfpos.schemes import REGISTRY

    parameters = scheme_parameters(context.args) if context else {}
    if scheme is None and parameters:
        raise PatchError(
            f"unknown option --{next(iter(parameters)).replace('_', '-')}; parameters of a scheme need --scheme"
        )
    chosen = None if scheme is None else REGISTRY[scheme].create(**parameters)
    loaded, tokenizer = load_model(model, dtype)
    return (loaded if chosen is None else patch(loaded, chosen)), tokenizer


def _documents(
    data: str, tokenizer: Any, model: str, lengths: list[int], bos: str, blocks: bool, **options: Any
) -> Any:
    from hfpos.evaluate.load import load_text

    if blocks:
        options["block_tokens"] = max(lengths) - (bos != "none")
    return load_text(data, tokenizer, model, **options)


def _stride(text: str | None) -> int | Literal["window"] | None:
    if text is None or text == "window":
        return text  # type: ignore[return-value]
    return parse(text)[0]


def _batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise PatchError(f"batch_size={text!r}: expected a whole number of 1 or more, or 'auto'")
    return int(text)


def _depths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise PatchError(f"depths={text!r}: expected numbers from 0 to 1 with commas between them") from error


def _share(text: str) -> float:
    from hfpos.evaluate.load import parse_share

    return parse_share(text)
