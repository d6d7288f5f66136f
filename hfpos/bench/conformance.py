"""The conformance sweeps: what each seam can do on every causal language model class of Transformers, and each scheme on the usual models.

`python -m hfpos.bench.conformance --write README.md` builds each class tiny, patches it, and holds it to `hfpos.bench.probes`. A cell is

- `works`: the logits move, they are what the scheme should give where `hfpos.bench.oracle` knows it, every probe holds, a saved copy
  loads equal (of each scheme), and `unpatch` gives bit-equal logits;
- `refused`: a `PatchError`, with its reason, and the model bit-equal;
- `fails`: anything else, which is a bug of hfpos.

A probe that the class fails unpatched is not held against the patch, but for what hfpos promises of any model. Of the schemes' sweep the
table of schemes (`hfpos.bench.catalogue`) is written too.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.progress import track

from hfpos.bench.catalogue import catalogue
from hfpos.bench.every_scheme import examine_all
from hfpos.bench.examine import SEAMS, Cell, Row, examine
from hfpos.bench.examples import all_examples
from hfpos.bench.matrix import replace_part, table
from hfpos.bench.models import MODELS
from hfpos.bench.pairs import pairs_table
from hfpos.bench.shrink import causal_lm_classes
from hfpos.scheme import PatchError, did_you_mean


SECONDS = 120  # for one model; the median takes one


class _TimeUp(BaseException):
    """Not an `Exception`, so that no probe takes it for a finding."""


def _in_time(examination: Callable[[str], Row], labels: tuple[str, ...], name: str) -> Row:
    def stop(number: int, frame: object) -> None:
        raise _TimeUp

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return examination(name)
    except _TimeUp:
        return Row(name, cells=dict.fromkeys(labels, Cell("fails", f"not done within {SECONDS} s")))
    finally:
        signal.alarm(0)


def _quiet_worker() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def sweep(
    examination: Callable[[str], Row], labels: Iterable[str], names: Iterable[str], processes: int = 2
) -> Iterator[Row]:
    """Run `examination`, which has a cell for each of `labels`, on each of `names` in a pool of processes; rows in the order given."""
    with multiprocessing.get_context("spawn").Pool(processes, _quiet_worker, maxtasksperchild=40) as pool:
        yield from pool.imap(partial(_in_time, examination, tuple(labels)), names)


def main(
    models: Annotated[list[str] | None, typer.Argument(help="model types; all unless given")] = None,
    write: Annotated[Path | None, typer.Option(help="write the tables into this file, between its markers")] = None,
    check: Annotated[Path | None, typer.Option(help="exit with 1 where a table in this file is stale")] = None,
    processes: Annotated[int, typer.Option(help="models examined at a time")] = 2,
) -> None:
    """Try every seam on every causal language model class, and every scheme on the usual models; print what works, is refused or fails."""
    classes = sorted(causal_lm_classes())
    chosen = models or [*classes, *MODELS]
    for name in chosen:
        if name not in classes and name not in MODELS:
            raise PatchError(f"unknown model type {name!r}: {did_you_mean(name, {*classes, *MODELS})}")
    if models and (write or check):
        raise PatchError("a table of some models only would replace that of all; leave the model types out")
    parts = {"catalogue": catalogue()}
    for part, examination, labels, known, render in (
        ("matrix", examine, SEAMS, classes, table),
        ("pairs", examine_all, all_examples(), MODELS, pairs_table),
    ):
        names = [name for name in dict.fromkeys(chosen) if name in known]
        rows = list(track(sweep(examination, labels, names, processes), description=part, total=len(names)))
        for row in rows:
            for label, cell in row.cells.items():
                if cell.status == "fails":
                    typer.echo(f"{row.model_type}: {label}: {cell.note}")
        parts[part] = render(rows)
    typer.echo("\n\n".join(parts.values()))
    _into_files(parts, write, check)


def _into_files(parts: dict[str, str], write: Path | None, check: Path | None) -> None:
    for path in filter(None, (write, check)):
        found = text = path.read_text(encoding="utf-8")
        for part, body in parts.items():
            text = replace_part(text, part, body)
        if path == write:
            path.write_text(text, encoding="utf-8")
        elif text != found:
            typer.echo(f"a table in {check} is stale; run `make matrix`", err=True)
            raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
