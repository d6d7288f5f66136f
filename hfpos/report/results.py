"""The typed schema of `results.json`: what was compared, with what, how and on what. Reading, writing, merging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from hfpos.evaluate.attention_profile import AttentionProfile
from hfpos.evaluate.result import PerplexityResult, Skipped
from hfpos.evaluate.retrieval import RetrievalResult
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from hfpos.data.documents import DocumentSet

SCHEMA: Literal["hfpos-results-1"] = "hfpos-results-1"


@dataclass(frozen=True)
class ModelInfo:
    """The model that was measured; `fingerprint` is a hash over its config and a sample of its weights."""

    path: str
    class_name: str
    family: str
    native_scheme: str
    parameters: int
    dtype: str
    device: str
    trained_length: int | None
    fingerprint: str


@dataclass(frozen=True)
class Protocol:
    """How perplexity was measured. `stride` None: the first L tokens of each document; a number or "window": sliding windows."""

    lengths: tuple[int, ...]
    stride: int | Literal["window"] | None
    bos: str
    bos_token_id: int | None
    aggregate: str
    tolerance: float
    seed: int


@dataclass(frozen=True)
class Data:
    """What was read: `sha256` is of the token ids of all documents measured; `preparation` says how they were cut and chosen."""

    source: str
    sha256: str
    documents: int
    tokens: int
    preparation: dict[str, Any]
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def of(cls, documents: DocumentSet, skipped: Iterable[Skipped] = ()) -> Data:
        """Of documents, with what was `skipped` beyond what their loading left out."""
        return cls(
            documents.source,
            documents.sha256,
            len(documents.documents),
            sum(len(document.ids) for document in documents.documents),
            documents.preparation,
            tuple(dict.fromkeys((*documents.skipped, *skipped))),
        )


@dataclass(frozen=True)
class Pattern:
    """What a scheme does to the attention logit of a key at each distance, if queries and keys are all alike.

    Attributes:
        kind: "rotation": mean over the rotated pairs of cos(distance x frequency), times the logit multiplier; "bias": what is
            added to the logit.
        distances: tokens between query and key.
        low, middle, high: the smallest, median and largest over the heads (all equal for a rotation), at each distance.
    """

    kind: Literal["rotation", "bias"]
    distances: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One scheme of a comparison.

    Attributes:
        label: unique in its comparison, e.g. `yarn` or `yarn(beta_fast=16)`.
        scheme: name in the registry; "none" for the model as it was loaded.
        parameters: all of the scheme's parameters, defaults included.
        needs_training: whether the model was trained with positions of another kind.
        perplexity: None where only retrieval was measured.
        retrieval: one entry a task.
        wavelengths: tokens for one turn of each dimension pair at the longest length, fastest first; a pair that stands still has None.
        pattern: None where the scheme puts nothing into attention.
        profile: where attention looks in the text, if that was asked for.
        seconds: wall time of the measurement.
    """

    label: str
    scheme: str
    parameters: dict[str, Any]
    needs_training: bool
    perplexity: PerplexityResult | None
    retrieval: tuple[RetrievalResult, ...] = ()
    wavelengths: tuple[float | None, ...] = ()
    pattern: Pattern | None = None
    profile: AttentionProfile | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """One model under several schemes, on the same data in the same way. The first run is what the others are compared with.

    `title` tells it from other comparisons, where the last part of the model's path does not.
    """

    model: ModelInfo
    protocol: Protocol
    data: Data
    runs: tuple[Run, ...]
    refused: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    title: str = ""

    @property
    def name(self) -> str:
        """The title, or the last part of the model's path or hub name."""
        return self.title or self.model.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def scores(self) -> dict[str, PerplexityResult]:
        """Label -> perplexity of the runs that have it, in their order."""
        return {run.label: run.perplexity for run in self.runs if run.perplexity and run.perplexity.by_length}

    @property
    def profiles(self) -> dict[str, AttentionProfile]:
        """Label -> where attention looks, of the runs that have it, in their order."""
        return {run.label: run.profile for run in self.runs if run.profile}

    @property
    def lengths(self) -> tuple[int, ...]:
        """The context lengths at which the perplexity of any run was measured, shortest first."""
        return tuple(sorted({length for result in self.scores.values() for length in result.by_length}))

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The documents that were left out, while the data was prepared or under any run, each once."""
        found = [*self.data.skipped, *(each for run in self.runs if run.perplexity for each in run.perplexity.skipped)]
        return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Results:
    """The content of a `results.json`: one comparison from `hfpos compare`, several from `hfpos report`."""

    comparisons: tuple[Comparison, ...]
    schema: Literal["hfpos-results-1"] = SCHEMA


_ADAPTER = TypeAdapter(Results)


def save(results: Results, path: Path) -> None:
    """Write JSON; `load` gives an equal object back.

    JSON has no infinity: an overflowed perplexity is written as the string "Infinity" (or "NaN") and read as a number again.
    """
    path.write_bytes(to_json(results, indent=2, inf_nan_mode="strings") + b"\n")


def load(path: str | Path) -> Results:
    """Read what `save` wrote.

    Raises:
        PatchError: no such file, or it does not hold results of this schema.
    """
    try:
        return _ADAPTER.validate_json(Path(path).read_bytes())
    except OSError as error:
        raise PatchError(
            f"cannot read {path} ({error.strerror}); expected a results.json of `hfpos compare`"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise PatchError(
            f"{path} is not a results.json of `hfpos compare`: {where}: {first['msg']} ({error.error_count()} such places)"
        ) from error


def merge(many: list[Results]) -> Results:
    """All comparisons of `many`, in order, each only once."""
    found: list[Comparison] = []
    for results in many:
        found += [comparison for comparison in results.comparisons if comparison not in found]
    return Results(tuple(found))
