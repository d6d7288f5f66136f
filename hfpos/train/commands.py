"""The commands `hfpos train` and `hfpos plan`."""

# What is slow to import is imported where it is used, so that `hfpos --help` answers at once.
from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


Recipe = Annotated[Path, typer.Argument(help="A recipe in YAML, e.g. one of recipes/.")]
Changes = Annotated[list[str] | None, typer.Argument(help="Changes of it: key=value, e.g. training.max_steps=100.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to the `hfpos` command."""
    app.command()(train)
    app.command()(plan)


def train(recipe: Recipe, changes: Changes = None) -> None:
    """Fine-tune a model as a recipe says.

    With several processes: accelerate launch --config_file recipes/accelerate/X.yaml -m hfpos.train RECIPE.yaml. A run that was killed goes on
    when the same command is given again. Exits with 1 where the recipe's short-context gate does not let the result pass.
    """
    from hfpos.train.recipe import Recipe as Parsed
    from hfpos.train.run import passes, run

    results = run(Parsed.load(recipe, changes or []))
    if not passes(results):
        typer.echo(
            f"short context got worse by {100 * results['after']['regression']:.1f} %, more than evaluation.max_regression",
            err=True,
        )
        raise typer.Exit(1)


def plan(
    recipe: Recipe,
    changes: Changes = None,
    config: Annotated[Path | None, typer.Option(help="Config of accelerate that the run is launched with.")] = None,
    processes: Annotated[int | None, typer.Option(help="Instead of that config's number.", min=1)] = None,
    device_memory: Annotated[
        float | None, typer.Option(help="GiB of one device; exits with 1 where the recipe does not fit.")
    ] = None,
) -> None:
    """Estimate the tokens and the memory of a recipe, without loading weights, and say what to change where it does not fit."""
    from hfpos.train.planning import plan as estimated
    from hfpos.train.recipe import Recipe as Parsed

    available = None if device_memory is None else device_memory * 2**30
    found = estimated(Parsed.load(recipe, changes or []), config, processes, available)
    typer.echo(found)
    if not found.fits:
        raise typer.Exit(1)
