"""The `hfpos` command. Thin: every subcommand calls the function of the library that does the work."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hfpos.evaluate import commands as evaluate_commands
from hfpos.scheme import PatchError
from hfpos.search import commands as search_commands
from hfpos.train import commands as train_commands


app = typer.Typer(
    name="hfpos",
    help="Change how a Hugging Face Transformers model knows positions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for commands in (evaluate_commands, train_commands, search_commands):
    commands.add_to(app)
SCHEME_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(context_settings=SCHEME_OPTIONS)
def patch(
    context: typer.Context,
    src: Annotated[str, typer.Argument(help="Folder or hub name of the model.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write the patched model to.")],
    scheme: Annotated[str, typer.Option(help="A name from `hfpos schemes`.")],
    layers: Annotated[
        str | None,
        typer.Option(help="Layers that get it, e.g. `[3,7]` or `full_attention`; the others stay as they are."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Write into DST even if it is not empty.")] = False,
    prove: Annotated[bool, typer.Option(help="Run a short probe that shows that the logits move.")] = True,
) -> None:
    """Load SRC, put a positional scheme into it, save it to DST.

    Every other option is a parameter of the scheme, e.g. `--factor 4` or `--original-length 2048`; `hfpos schemes` lists them.
    """
    import hfpos
    from hfpos.checkpoint import load_tokenizer
    from hfpos.schemes import REGISTRY

    chosen = REGISTRY[scheme].create(
        **scheme_parameters(context.args)
    )  # a misspelt name fails before anything is loaded
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())) and not overwrite:
        raise PatchError(f"{dst} exists and is not an empty folder; choose another one, or pass --overwrite")
    model = hfpos.from_pretrained(src, dtype="auto")
    tokenizer = load_tokenizer(src)
    hfpos.patch(model, chosen, layers=None if layers is None else _value(layers), tokenizer=tokenizer, prove=prove)
    model.save_pretrained(dst)
    if tokenizer is not None:
        tokenizer.save_pretrained(dst)
    typer.echo(hfpos.describe(model))
    typer.echo(f"written to {dst}" + ("" if tokenizer is not None else f" (no tokenizer found in {src})"))


@app.command()
def describe(
    src: Annotated[str, typer.Argument(help="Folder or hub name of a model or PEFT adapter.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw its rotary wavelengths into this file too: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Show which positions a saved model has. Reads its config only, no weights."""
    import hfpos
    from hfpos.checkpoint import load_skeleton
    from hfpos.report.plots import plot_wavelengths

    skeleton = load_skeleton(src)
    description = hfpos.describe(skeleton)
    if plot is not None:
        plot_wavelengths(skeleton, plot)
    typer.echo(json.dumps(dataclasses.asdict(description), indent=2) if as_json else str(description))


@app.command()
def schemes() -> None:
    """List the positional schemes, their papers and their parameters."""
    from hfpos.schemes import REGISTRY

    table = Table("scheme", "paper", "parameters", "what it does", box=None, header_style="bold")
    for name, cls in REGISTRY.as_dict().items():
        names = ", ".join((name, *cls.aliases))
        parameters = ", ".join(_signature(field) for field in dataclasses.fields(cls) if field.compare)
        table.add_row(names, cls.paper, parameters or "none", cls.summary)
    _print(table)


@app.command()
def families() -> None:
    """List the model families, and at which seams a scheme can reach them."""
    from hfpos.families import REGISTRY

    table = Table("family", "seams", "models", box=None, header_style="bold")
    for name, cls in REGISTRY.as_dict().items():
        table.add_row(name, ", ".join(cls.seams), (cls.__doc__ or "").splitlines()[0])
    _print(table)


@app.command()
def demo(
    model: Annotated[
        Path | None, typer.Option(help="Folder of your own model and tokenizer; else one is trained.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Your own text: a file, a folder or .jsonl(.gz); else Python's sources.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json, the plot and the trained models.")] = Path(
        "hfpos-demo"
    ),
    factor: Annotated[float, typer.Option(help="How many times the trained length to go to, above 1.")] = 4.0,
    finetune: Annotated[bool, typer.Option(help="Fine-tune a little under the best scheme.")] = True,
    finetune_steps: Annotated[int, typer.Option(help="Optimizer steps of that.")] = 150,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens to measure on.")] = 65_536,
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and the order of the data.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice unless given.")] = None,
) -> None:
    """Train a small LLaMA on real text, patch it with several schemes, measure perplexity by length, fine-tune the best."""
    from hfpos.demo import DemoOptions, run

    run(
        DemoOptions(
            model=model,
            text=text,
            out=out,
            factor=factor,
            finetune=finetune,
            finetune_steps=finetune_steps,
            eval_tokens=eval_tokens,
            seed=seed,
            threads=threads,
        )
    )


@app.command()
def bench(
    name: Annotated[
        str, typer.Argument(help="`overhead`, `attention`, `remapping`, `bloom`, `eval`, `train`, `scratch` or `all`.")
    ] = "all",
    out: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file too.")] = None,
) -> None:
    """Measure hfpos against stock Transformers, side by side in one run; prints ratios. all but `overhead` and `eval` take some minutes each."""
    from hfpos.bench.run import run

    results = run(name)
    text = json.dumps(results, indent=2)
    typer.echo(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def scheme_parameters(arguments: list[str]) -> dict[str, Any]:
    """`["--factor", "4", "--cache=exact"]` as keywords: numbers, lists, True, False and None are read as such, the rest is text.

    >>> scheme_parameters(["--factor", "4", "--original-length=2048", "--init", "tile"])
    {'factor': 4, 'original_length': 2048, 'init': 'tile'}
    """
    parameters: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise PatchError(f"{word!r} is not expected here; parameters of the scheme are given as --name value")
        name, given, value = word[2:].partition("=")
        if not given:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise PatchError(f"--{name} has no value; expected --{name} VALUE")
            value = following
        key = name.replace("-", "_")
        if key in parameters:
            raise PatchError(f"--{name} is given twice")
        parameters[key] = _value(value)
    return parameters


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def main() -> None:
    """Entry point: a `PatchError` becomes one line on stderr and exit code 2."""
    try:
        app()
    except PatchError as error:
        print(f"hfpos: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if not end.code and "WORLD_SIZE" in os.environ:
            from hfpos.evaluate.processes import leave

            leave()
        raise


def _signature(field: dataclasses.Field) -> str:
    return field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default}"


def _print(table: Table) -> None:
    console = Console()
    # piped output is for programs: one row a line, nothing cut
    Console(width=console.width if console.is_terminal else 400).print(table)


if __name__ == "__main__":
    main()
