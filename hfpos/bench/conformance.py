"""The conformance sweep: what each seam can do on every causal language model class of Transformers.

`python -m hfpos.bench.conformance --write README.md` builds each class tiny, patches it at each seam with one scheme, and
holds it to `hfpos.bench.probes` and `hfpos.bench.oracle`. A cell of the table is

- `works`: the logits move, they are what the scheme should give where that is known, every probe holds, and `unpatch` gives
  bit-equal logits;
- `refused`: a `PatchError`, with its reason, and the model bit-equal;
- `fails`: anything else, which is a bug of hfpos.

A probe that the class fails unpatched is not held against the patch.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.progress import track

from hfpos.bench.examine import SEAMS, Cell, Row, examine
from hfpos.bench.matrix import replace_matrix, table
from hfpos.bench.shrink import causal_lm_classes


SECONDS = 120  # for one model class; the median takes one


class _TimeUp(BaseException):
    """Not an `Exception`, so that no probe takes it for a finding."""


def _examine_in_time(model_type: str) -> Row:
    def stop(number: int, frame: object) -> None:
        raise _TimeUp

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return examine(model_type)
    except _TimeUp:
        return Row(model_type, cells={seam: Cell("fails", f"not done within {SECONDS} s") for seam in SEAMS})
    finally:
        signal.alarm(0)


def _quiet_worker() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


def sweep(model_types: Iterable[str], processes: int = 2) -> Iterator[Row]:
    """Examine the classes of `model_types` in a pool of processes; yields rows in the order given."""
    with multiprocessing.get_context("spawn").Pool(processes, _quiet_worker, maxtasksperchild=40) as pool:
        yield from pool.imap(_examine_in_time, model_types)


def main(
    models: Annotated[list[str] | None, typer.Argument(help="model types; all unless given")] = None,
    write: Annotated[Path | None, typer.Option(help="write the table into this file, between its markers")] = None,
    check: Annotated[Path | None, typer.Option(help="exit with 1 where the table in this file is stale")] = None,
    processes: Annotated[int, typer.Option(help="models examined at a time")] = 2,
) -> None:
    """Try every seam on every causal language model class of Transformers and print what works, is refused or fails."""
    chosen = models or sorted(causal_lm_classes())
    rows = list(track(sweep(chosen, processes), description="models", total=len(chosen)))
    for row in rows:
        for seam, cell in row.cells.items():
            if cell.status == "fails":
                typer.echo(f"{row.model_type} {seam}: {cell.note}")
    body = table(rows)
    typer.echo(body)
    if write is not None:
        write.write_text(replace_matrix(write.read_text(encoding="utf-8"), body), encoding="utf-8")
    if check is not None and replace_matrix(text := check.read_text(encoding="utf-8"), body) != text:
        typer.echo(f"the table in {check} is stale; run `make matrix`", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
