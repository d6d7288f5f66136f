"""The perplexity of a candidate: the model patched with it for as long as it is measured."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from hfpos.data.documents import TokenizedDocument
from hfpos.describe import describe
from hfpos.evaluate.arguments import check_documents, size_with_bos
from hfpos.evaluate.perplexity import perplexity
from hfpos.evaluate.processes import from_main
from hfpos.families import family_of
from hfpos.patching import language_model, patched, record_of
from hfpos.scheme import Geometry, PatchError, Scheme
from hfpos.schemes import REGISTRY
from hfpos.schemes.longrope import LongRope
from hfpos.search.factors import START_SCHEMES, Factors


ByLength = dict[int, float]  # perplexity by context length in tokens


class Fitness:
    """Measures candidates, which differ in `long_factor` alone.

    Args:
        model: comes out of every measurement as it went in.
        documents: of at least the target length.
        scheme: what all candidates share.
        lengths: original and target length, in tokens.
        protocol: further arguments of `hfpos.evaluate.perplexity`.
    """

    def __init__(
        self,
        model: nn.Module,
        documents: list[TokenizedDocument],
        scheme: LongRope,
        lengths: tuple[int, int],
        protocol: dict[str, Any],
    ) -> None:
        self.model = model
        self.documents = documents
        self.scheme = scheme
        self.lengths = lengths
        self.protocol = protocol

    def __call__(self, factors: Factors) -> float:
        """The perplexity at the target length, one forward for each document."""
        target = self.lengths[1]
        return self._measure(self._candidate(factors), [target])[target]

    def prove(self, factors: Factors) -> None:
        """Raise `PatchError` unless the model goes by such factors; shown once, the candidates do without."""
        with patched(self.model, self._candidate(factors)):
            pass

    def table(self, candidates: dict[str, Factors]) -> dict[str, ByLength]:
        """At both lengths, the perplexity of the model as it is, and of each of `candidates`."""
        found = {"unpatched": self._measure(None, self.lengths)}
        return found | {
            name: self._measure(self._candidate(factors), self.lengths) for name, factors in candidates.items()
        }

    def as_schemes(self) -> dict[str, ByLength]:
        """At both lengths, the perplexity under the schemes that the search starts from, with their own factor on cos and sin."""
        original, target = self.lengths
        return {
            name: self._measure(REGISTRY[name].create(original_length=original, target_length=target), self.lengths)
            for name in START_SCHEMES.values()
        }

    def _candidate(self, factors: Factors) -> LongRope:
        return dataclasses.replace(self.scheme, long_factor=factors)

    def _measure(self, scheme: Scheme | None, lengths: Sequence[int]) -> ByLength:
        with contextlib.nullcontext() if scheme is None else patched(self.model, scheme, prove=False):
            found = perplexity(self.model, self.documents, lengths, **self.protocol).by_length
        # each process of a model in shards measures for itself
        return from_main(lambda: {length: found[length].perplexity for length in lengths})


def rotary_geometry(model: nn.Module) -> Geometry:
    """The numbers of the model before any patch. Raises `PatchError` unless rotary embeddings are what it has now."""
    target = language_model(model)
    found = describe(model)
    if found.seam not in ("freq", "score"):
        raise PatchError(
            f"search: {found.model} has no rotary embeddings in use (its positions are {found.scheme!r}), and frequencies are what "
            "is searched; expected e.g. a LLaMA, Qwen or Phi model"
        )
    record = record_of(target)
    return family_of(target).geometry() if record is None else record.geometry


def long_documents(
    model: nn.Module, documents: Any, tokenizer: Any, target_length: int, bos_token: int | None
) -> list[TokenizedDocument]:
    """The documents as token ids. Raises `PatchError` where one of them does not reach the target length."""
    vocabulary = language_model(model).config.get_text_config().vocab_size
    rows, _ = check_documents(documents, tokenizer, vocabulary, skip_bad=False)
    short = [row for row in rows if size_with_bos(row, bos_token) < target_length]
    if short:
        raise PatchError(
            f"search: {short[0].name} has {size_with_bos(short[0], bos_token)} tokens, fewer than the target length {target_length} "
            f"({len(short)} of {len(rows)} documents are too short); leave those out (--min-tokens), or give longer texts"
        )
    return rows
