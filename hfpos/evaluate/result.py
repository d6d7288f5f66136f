"""What `perplexity` returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hfpos.scheme import PatchError


@dataclass(frozen=True)
class Bucket:
    """The mean loss (nats) of the tokens with `start` up to but not including `stop` tokens before them in their window."""

    start: int
    stop: int
    nll: float
    tokens: int


@dataclass(frozen=True)
class Skipped:
    """A document that was left out, and why."""

    document: str
    reason: str


@dataclass(frozen=True)
class LengthScore:
    """What was measured at one context length.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood in nats, over tokens, or with `aggregate="windows"` over the means of the windows.
        tokens: how many tokens were scored, each once.
        documents: how many documents they are from.
        windows: how many windows the model read.
        stderr: standard error of `perplexity` over documents, by bootstrap; None for a single document.
        bits_per_byte: information per byte of the text that was scored, None where the documents came as ids only.
        curve: the mean loss by position in the window, i.e. by how much context a token had, in position order.
    """

    perplexity: float
    nll: float
    tokens: int
    documents: int
    windows: int = 0
    stderr: float | None = None
    bits_per_byte: float | None = None
    curve: tuple[Bucket, ...] = ()

    def perplexity_between(self, start: int, stop: int) -> float:
        """The perplexity of the tokens that have `start` up to but not including `stop` tokens before them in their window.

        Raises:
            PatchError: the curve is not divided there; it is at the other lengths measured, and at the trained one.
        """
        inside = [bucket for bucket in self.curve if start <= bucket.start and bucket.stop <= stop]
        if not inside or (inside[0].start, inside[-1].stop) != (max(start, self.curve[0].start), stop):
            edges = sorted({edge for bucket in self.curve for edge in (bucket.start, bucket.stop)})
            raise PatchError(
                f"no part of the loss curve starts at {start} and stops at {stop}; the curve is divided at {edges}"
            )
        return math.exp(sum(bucket.nll * bucket.tokens for bucket in inside) / sum(bucket.tokens for bucket in inside))


@dataclass(frozen=True)
class PerplexityResult:
    """Scores by context length, shortest first, and the documents that were skipped; `str()` is a table."""

    by_length: dict[int, LengthScore]
    skipped: tuple[Skipped, ...] = ()

    def effective_context(self, tolerance: float = 0.01) -> int:
        """The longest measured length whose perplexity is within `tolerance` of the best shorter one, in tokens.

        It is the shortest length measured where no longer one is. Compare lengths over the same documents only.

        >>> score = lambda perplexity: LengthScore(perplexity, nll=0.0, tokens=1, documents=1)
        >>> PerplexityResult({128: score(9.0), 256: score(8.0), 512: score(8.05), 1024: score(12.0)}).effective_context()
        512
        """
        best, found = float("inf"), min(self.by_length)
        for length, score in sorted(self.by_length.items()):
            if score.perplexity <= best * (1 + tolerance):
                found = length
            best = min(best, score.perplexity)
        return found

    def __str__(self) -> str:
        lines = [
            f"{'length':>8} {'perplexity':>11} {'stderr':>8} {'nll':>8} {'bits/byte':>9} {'tokens':>10} {'documents':>10}"
        ]
        for length, score in self.by_length.items():
            lines.append(
                f"{length:>8} {score.perplexity:>11.4g} {_or_dash(score.stderr, '8.2g')} {score.nll:>8.4f} "
                f"{_or_dash(score.bits_per_byte, '9.4f')} {score.tokens:>10,} {score.documents:>10,}"
            )
        return "\n".join(lines + [f"skipped: {each.document}: {each.reason}" for each in self.skipped])


def _or_dash(value: float | None, form: str) -> str:
    return "-".rjust(int(form.split(".")[0])) if value is None else format(value, f">{form}")
