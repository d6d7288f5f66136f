"""What a search found, as a table and as files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic_core import to_json

from hfpos.report.results import Data
from hfpos.search.evolution import Generation, Settings
from hfpos.search.fitness import ByLength


@dataclass(frozen=True)
class SearchResult:
    """The best candidate of a search, and how it compares.

    Attributes:
        long_factor: the divisors found, rotary_dim / 2, the fastest frequency's first.
        short_factor: ones. Used up to the original length where the patch chooses by length, `cache="exact"`.
        attention_factor: the factor on cos and sin, the same for every candidate.
        original_length, target_length: in tokens.
        perplexity: at both lengths, on the documents of the search: of the model as it came ("unpatched"), with the frequencies
            of PI, NTK and YaRN that the search began with ("pi", "ntk", "yarn"), and with the divisors found ("best").
        as_schemes: the same of the schemes `linear`, `ntk` and `yarn`, which have their own factor on cos and sin.
        history: the lowest perplexity at the target length after each generation.
        settings: how long and how wide was searched.
        documents: how many documents were read.
        data_sha256: over their token ids.
        fingerprint: a hash over the model's config and a sample of its weights.
    """

    long_factor: tuple[float, ...]
    short_factor: tuple[float, ...]
    attention_factor: float
    original_length: int
    target_length: int
    perplexity: dict[str, ByLength]
    as_schemes: dict[str, ByLength]
    history: tuple[Generation, ...]
    settings: Settings
    documents: int
    data_sha256: str
    fingerprint: str

    @property
    def parameters(self) -> dict[str, Any]:
        """What was measured, as parameters of the scheme: `hfpos.patch(model, "longrope", **result.parameters)`."""
        return {
            "long_factor": list(self.long_factor),
            "short_factor": list(self.short_factor),
            "target_length": self.target_length,
            "original_length": self.original_length,
            "attention_factor": self.attention_factor,
            "cache": "pinned",
        }

    def __str__(self) -> str:
        lengths = (self.original_length, self.target_length)
        rows = {**self.perplexity, **{f"{name} itself": found for name, found in self.as_schemes.items()}}
        lines = [f"{'perplexity at':<16}" + "".join(f"{length:>12,}" for length in lengths)]
        lines += [
            f"{name:<16}" + "".join(f"{found[length]:>12.4g}" for length in lengths) for name, found in rows.items()
        ]
        return "\n".join(
            [
                *lines,
                f"pi, ntk, yarn: their frequencies with the attention factor of the search, {self.attention_factor:.4g}; "
                f"{', '.join(self.as_schemes)} themselves have their own",
                f"best of {self.history[-1].candidates:,} candidates: {' '.join(f'{each:.4g}' for each in self.long_factor)}",
            ]
        )


@dataclass(frozen=True)
class SearchRecord:
    """The content of a `search.json`: what was searched, with what, on what, and what was found."""

    model: str
    dtype: str
    data: Data
    result: SearchResult
    provenance: dict[str, Any]
    schema: Literal["hfpos-search-1"] = "hfpos-search-1"


def write(record: SearchRecord, folder: Path) -> Path:
    """Write `search.json`, and `longrope.json`: the scheme's name and parameters, as a recipe's `scheme:` takes them.

    Returns:
        The path of `longrope.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "longrope.json"
    path.write_bytes(to_json({"name": "longrope", **record.result.parameters}, indent=2) + b"\n")
    # JSON has no infinity, which a perplexity can be
    (folder / "search.json").write_bytes(to_json(record, indent=2, inf_nan_mode="strings") + b"\n")
    return path
