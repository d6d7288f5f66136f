"""Measuring what a model makes of long context."""

from hfpos.evaluate.compare import compare
from hfpos.evaluate.key_value import key_value
from hfpos.evaluate.needle import needle
from hfpos.evaluate.passkey import passkey
from hfpos.evaluate.perplexity import perplexity
from hfpos.evaluate.result import Bucket, LengthScore, PerplexityResult, Skipped
from hfpos.evaluate.retrieval import RetrievalCell, RetrievalResult


__all__ = [
    "Bucket",
    "LengthScore",
    "PerplexityResult",
    "RetrievalCell",
    "RetrievalResult",
    "Skipped",
    "compare",
    "key_value",
    "needle",
    "passkey",
    "perplexity",
]
