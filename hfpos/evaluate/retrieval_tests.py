"""The retrieval tests of a comparison, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hfpos.data import read_documents
from hfpos.evaluate.key_value import key_value
from hfpos.evaluate.needle import needle
from hfpos.evaluate.passkey import passkey
from hfpos.evaluate.retrieval import RetrievalResult
from hfpos.scheme import PatchError, did_you_mean


TESTS = ("passkey", "needle", "key_value")


def chosen_tests(
    names: str,
    lengths: Sequence[int],
    *,
    tokenizer: Any,
    haystack: str | Path | None,
    depths: Sequence[float],
    trials: int,
    seed: int,
) -> list[Callable[[nn.Module], RetrievalResult]]:
    """The tests that `names` lists with commas between them, ready to be run on a model.

    Args:
        names: of `TESTS`; "" for none.
        lengths, depths, trials, seed: of the grid that each is run on.
        tokenizer: the model's; `key_value` needs none.
        haystack: text to hide needles in: a file or folder.

    Raises:
        PatchError: an unknown name, or `needle` without a haystack.

    >>> [len(chosen_tests(names, [64], tokenizer=None, haystack=None, depths=[0.5], trials=1, seed=0)) for names in ("", "key_value")]
    [0, 1]
    """
    chosen = [name.strip().replace("-", "_") for name in names.split(",")] if names else []
    for name in chosen:
        if name not in TESTS:
            raise PatchError(f"retrieval: {name!r} is unknown: {did_you_mean(name, TESTS)}")
    if "needle" in chosen and haystack is None:
        raise PatchError("retrieval: needle hides facts in a text of yours, and none was given; pass haystack=")
    if haystack is not None and "needle" not in chosen:
        raise PatchError(f"haystack={str(haystack)!r} is for the needle test, which is not among retrieval={names!r}")
    grid: dict[str, Any] = {"depths": depths, "trials": trials, "seed": seed}
    text = [] if haystack is None else read_documents(haystack)
    tests: dict[str, Callable[[nn.Module], RetrievalResult]] = {
        "passkey": lambda model: passkey(model, tokenizer, lengths, **grid),
        "needle": lambda model: needle(model, tokenizer, text, lengths, **grid),
        "key_value": lambda model: key_value(model, lengths, **grid),
    }
    return [tests[name] for name in dict.fromkeys(chosen)]
