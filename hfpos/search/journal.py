"""A record of measured candidates on disk, so that a search that was killed goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfpos.evaluate.processes import from_main, is_main
from hfpos.scheme import PatchError
from hfpos.search.factors import Factors


FILE = "candidates.jsonl"


class Journal:
    """JSON lines: first what a perplexity of this search depends on, then one line for each candidate.

    Chance is drawn from a seed, so a search that is begun again asks for the same candidates in the same order and finds them here. One
    with another seed, or with more iterations, takes from here what it can.

    Args:
        folder: where the file lies; made if need be. None keeps no journal.
        about: what a perplexity depends on besides the factors: model, data, lengths.

    Raises:
        PatchError: the folder holds the journal of a search of which something in `about` is different.
    """

    def __init__(self, folder: str | Path | None, about: dict[str, Any]) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        path = self.path
        self.known: dict[Factors, float] = {} if path is None else from_main(lambda: _open(path, about))

    def add(self, factors: Factors, perplexity: float) -> None:
        """Write a measured candidate down, before the next one is begun."""
        self.known[factors] = perplexity
        if self.path is not None and is_main():
            _write(self.path, {"long_factor": factors, "perplexity": perplexity})


def _open(path: Path, about: dict[str, Any]) -> dict[Factors, float]:
    """What earlier runs of this search have measured."""
    if path.parent.exists() and not path.parent.is_dir():
        raise PatchError(f"{path.parent} is a file; expected a folder for the search")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = _read(path)
    if not rows:
        _write(path, {"search": about})
        return {}
    found = rows[0].get("search", {})
    other = [f"{key} {found.get(key)!r}, not {value!r}" for key, value in about.items() if found.get(key) != value]
    if other:
        raise PatchError(f"{path} is of another search: {'; '.join(other)}; choose another folder, or delete this one")
    return {tuple(row["long_factor"]): row["perplexity"] for row in rows[1:]}


def _write(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        # a line of its own, also after one that was cut off
        file.write("\n" + json.dumps(row))


def _read(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # empty, or being written when the process was killed
    return rows
