"""The commands that measure: `hfpos eval ...`, `hfpos lm-eval`, and those that write a report. Options are the library's arguments."""

# What is slow to import is imported where it is used, so that `hfpos --help` answers at once.
from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfpos.evaluate import options, report_commands
from hfpos.scheme import PatchError


SCHEME_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}
EVAL = typer.Typer(no_args_is_help=True, help="Measure one model: perplexity against length, and retrieval.")


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to the `hfpos` command."""
    app.add_typer(EVAL, name="eval")
    report_commands.add_to(app)
    app.command("lm-eval", context_settings=SCHEME_OPTIONS | {"help_option_names": []})(lm_eval)


@EVAL.command(context_settings=SCHEME_OPTIONS)
def ppl(
    context: typer.Context,
    model: options.Model,
    data: options.Text,
    lengths: options.Lengths,
    stride: options.Stride = None,
    bos: options.Bos = "none",
    bos_token_id: options.BosId = None,
    aggregate: options.Aggregate = "tokens",
    scheme: options.SchemeName = None,
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
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    resume: Annotated[
        Path | None, typer.Option(help="Folder of a journal: a run that was killed goes on where it was.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every number to this JSON file.")] = None,
) -> None:
    """Perplexity against context length."""
    from hfpos.evaluate import perplexity
    from hfpos.evaluate.compare import measured_alone
    from hfpos.evaluate.load import load_text
    from hfpos.evaluate.processes import is_main
    from hfpos.report.results import save

    loaded, tokenizer = _patched(context, model, scheme, dtype)
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
    protocol: dict[str, Any] = {"bos": bos, "bos_token_id": bos_token_id, "aggregate": aggregate, "seed": seed}
    running = {"batch_size": batch_size, "chunk": chunk, "skip_bad": skip_bad, "resume": resume, "progress": True}
    result = perplexity(loaded, documents, lengths, stride, **protocol, **running)
    if not is_main():
        return
    typer.echo(result)
    held = result.effective_context(tolerance)
    typer.echo(f"effective context: {held:,} tokens (within {100 * tolerance:g} % of the best shorter length)")
    if out is not None:
        results = measured_alone(
            loaded, result, documents, lengths, stride, **protocol, tolerance=tolerance, name=model
        )
        save(results, out)


@EVAL.command(context_settings=SCHEME_OPTIONS)
def passkey(
    context: typer.Context,
    model: options.Model,
    lengths: options.Lengths,
    depths: options.Depths = "0,0.25,0.5,0.75,1",
    trials: options.Trials = 5,
    scheme: options.SchemeName = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
) -> None:
    """The pass key test: a number hidden in filler."""
    from hfpos.evaluate import passkey as test

    loaded, tokenizer = _patched(context, model, scheme, dtype)
    _show(test(loaded, tokenizer, lengths, depths=depths, trials=trials, seed=seed, progress=True))


@EVAL.command(context_settings=SCHEME_OPTIONS)
def needle(
    context: typer.Context,
    model: options.Model,
    lengths: options.Lengths,
    haystack: Annotated[str, typer.Option(help="Text to hide needles in: a file, .jsonl(.gz) or folder.")],
    needles: Annotated[int, typer.Option(help="Facts to be found in each prompt.")] = 1,
    distractors: Annotated[int, typer.Option(help="Further facts of the same form that are not asked for.")] = 0,
    depths: options.Depths = "0,0.25,0.5,0.75,1",
    trials: options.Trials = 5,
    scheme: options.SchemeName = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
) -> None:
    """Needles in a haystack: facts hidden in your own text."""
    from hfpos.data import read_documents
    from hfpos.evaluate import needle as test

    text = read_documents(haystack)
    loaded, tokenizer = _patched(context, model, scheme, dtype)
    facts: dict[str, Any] = {"needles": needles, "distractors": distractors}
    _show(test(loaded, tokenizer, text, lengths, depths=depths, trials=trials, seed=seed, progress=True, **facts))


@EVAL.command("key-value", context_settings=SCHEME_OPTIONS)
def key_value(
    context: typer.Context,
    model: options.Model,
    lengths: options.Lengths,
    pairs: Annotated[int, typer.Option(help="Pairs of key and value in each context.")] = 8,
    depths: options.Depths = "0,0.25,0.5,0.75,1",
    trials: options.Trials = 20,
    scheme: options.SchemeName = None,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
) -> None:
    """Recall of random tokens: needs no language, and no tokenizer."""
    from hfpos.evaluate import key_value as test

    loaded, _ = _patched(context, model, scheme, dtype)
    _show(test(loaded, lengths, depths=depths, pairs=pairs, trials=trials, seed=seed, progress=True))


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness, with the model type `hfpos`; all options are its own."""
    from hfpos.evaluate.harness import main

    main(context.args)


def _patched(context: typer.Context | None, model: str, scheme: str | None, dtype: str) -> tuple[Any, Any]:
    """The model, patched as the options say, and its tokenizer."""
    from hfpos.cli import scheme_parameters
    from hfpos.evaluate.load import load_model
    from hfpos.patching import patch
    from hfpos.schemes import REGISTRY

    parameters = scheme_parameters(context.args) if context else {}
    if scheme is None and parameters:
        name = next(iter(parameters)).replace("_", "-")
        raise PatchError(f"unknown option --{name}; parameters of a scheme need --scheme")
    chosen = None if scheme is None else REGISTRY[scheme].create(**parameters)
    loaded, tokenizer = load_model(model, dtype)
    return (loaded if chosen is None else patch(loaded, chosen)), tokenizer


def _show(result: object) -> None:
    from hfpos.evaluate.processes import is_main

    if is_main():
        typer.echo(result)
