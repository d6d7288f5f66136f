"""Searching for positional parameters that suit a model: LongRoPE's divisors of the rotary frequencies."""

from hfpos.search.longrope import search
from hfpos.search.result import SearchRecord, SearchResult


__all__ = ["SearchRecord", "SearchResult", "search"]
