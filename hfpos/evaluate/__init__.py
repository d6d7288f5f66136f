"""Measuring what a model makes of long context."""

from hfpos.evaluate.perplexity import LengthScore, PerplexityResult, perplexity


__all__ = ["LengthScore", "PerplexityResult", "perplexity"]
