"""A record of finished documents on disk, so that a measurement that was killed goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from hfpos.data.documents import TokenizedDocument
from hfpos.evaluate.tally import Tally
from hfpos.patching import language_model


Tallies = dict[int, Tally]  # by context length


class Journal:
    """JSON lines, one a finished document, in a file of this process; those of all processes and of earlier runs are read.

    Args:
        folder: where the files lie; made if need be. None keeps no journal.
        key: what was measured and how; records of another key are not seen.
        process: this process's number.
    """

    def __init__(self, folder: str | Path | None, key: str, process: int = 0) -> None:
        self.path: Path | None = None
        self.known: dict[str, Tallies] = {}
        if folder is None:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(folder).glob(f"{key}-*.jsonl")):
            self.known |= _read(path)
        self.path = Path(folder) / f"{key}-{process}.jsonl"

    def get(self, document: TokenizedDocument) -> Tallies | None:
        """The tallies of a document, None if it is not finished."""
        return self.known.get(_digest(document)) if self.known else None

    def add(self, document: TokenizedDocument, tallies: Tallies) -> None:
        """Write a finished document down, before the next one is begun."""
        if self.path is None:
            return
        values = {length: dataclasses.asdict(tally) for length, tally in tallies.items()}
        with self.path.open("a", encoding="utf-8") as file:
            # a line of its own, also after one that was cut off
            file.write("\n" + json.dumps({"document": _digest(document), "tallies": values}))


def _read(path: Path) -> dict[str, Tallies]:
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the process was killed
        found[row["document"]] = {int(length): Tally(**values) for length, values in row["tallies"].items()}
    return found


def digest(*values: Any) -> str:
    """A short hash of plain values.

    >>> digest("a", 1) == digest("a", 1) != digest("a", 2)
    True
    """
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _digest(document: TokenizedDocument) -> str:
    """A short hash of a document's token ids, and of whether their bytes are known."""
    known = document.token_bytes is not None
    return hashlib.sha256(document.ids.numpy().tobytes() + bytes([known])).hexdigest()[:16]


def fingerprint(model: nn.Module) -> str:
    """A short hash that tells models apart: class, config (the scheme included), and eight values of every weight.

    Other weights of the same shape give another fingerprint, unless they differ nowhere that is looked at.
    """
    language = language_model(model)
    seen = hashlib.sha256(f"{type(language).__name__} {language.config.to_json_string(use_diff=False)}".encode())
    for name, weight in model.named_parameters():
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        flat = local.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 8)][:8].float().cpu() if not flat.is_meta else flat[:0]
        seen.update(f"{name} {tuple(weight.shape)} {weight.dtype} {picked.tolist()}".encode())
    return seen.hexdigest()[:16]
