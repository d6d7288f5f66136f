"""What was measured, on what and how, in plain words."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING

from hfpos.report.numbers import plain, share


if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpos.report.results import Comparison, Protocol


def counted(count: int, thing: str) -> str:
    """A number and its noun.

    >>> counted(1, "document"), counted(2000, "token")
    ('1 document', '2,000 tokens')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def listed(words: Sequence[str]) -> str:
    """Words with commas, and `and` before the last.

    >>> listed(["a", "b", "c"]), listed(["a"])
    ('a, b and c', 'a')
    """
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def in_one_line(comparison: Comparison) -> str:
    """Model, protocol and data, short."""
    model, protocol, data = comparison.model, comparison.protocol, comparison.data
    trained = f"trained at {model.trained_length:,} tokens" if model.trained_length else "trained length not stated"
    bos = f"bos={protocol.bos}" + (f" (id {protocol.bos_token_id})" if protocol.bos_token_id is not None else "")
    return (
        f"{model.class_name}, {counted(model.parameters, 'parameter')}, {model.dtype} on {model.device}, {trained}. "
        f"Protocol: stride={protocol.stride or 'none (first tokens of each document)'}, {bos}, "
        f"aggregate={protocol.aggregate}, seed={protocol.seed}. "
        f"Data: {data.source}, {counted(data.documents, 'document')}, {counted(data.tokens, 'token')}, "
        f"sha256 {data.sha256[:12]}."
    )


def protocol_in_words(protocol: Protocol) -> list[str]:
    """How perplexity was measured, a sentence or two for each choice."""
    return [_windows(protocol), _bos(protocol), _aggregate(protocol)]


def _windows(protocol: Protocol) -> str:
    once = "Every scored token counts exactly once."
    if protocol.stride is None:
        return (
            "For a context length of L tokens, the model reads the first L tokens of each document that has that many, in "
            f"one window. {once} Shorter documents do not count at that length."
        )
    if protocol.stride == "window":
        return (
            "Each document is cut into windows of L tokens that do not overlap, and the model reads each window by itself. "
            f"{once} Tokens at the start of a window have little before them."
        )
    return (
        f"A window of L tokens slides over each document, {counted(protocol.stride, 'token')} further each time, and only "
        f"the tokens that no window has scored yet are scored. {once} From the second window on, each has at least "
        f"L - {protocol.stride:,} tokens before it."
    )


def _bos(protocol: Protocol) -> str:
    token = "a start-of-text token (BOS" + (
        f", id {protocol.bos_token_id})" if protocol.bos_token_id is not None else ")"
    )
    if protocol.bos == "every-window":
        return f"Every window begins with {token}, which takes one of its L places and is not scored."
    if protocol.bos == "first":
        return f"The first window of each document begins with {token}, which is not scored; the later ones do not."
    return (
        "No start-of-text token (BOS) is put in front: the model reads the text as it is, and the first token, which has "
        "nothing before it, is not scored."
    )


def _aggregate(protocol: Protocol) -> str:
    mean = (
        "over all scored tokens, each weighing the same"
        if protocol.aggregate == "tokens"
        else "first within each window and then over the windows, so that a short window weighs as much as a long one (older "
        "papers did this)"
    )
    return f"Perplexity is the exponential of the mean loss. The mean is taken {mean}."


def provenance_rows(comparison: Comparison) -> list[tuple[str, str]]:
    """(name, value) of all that is recorded about the run, except the command."""
    return [(key.replace("_", " "), plain(value)) for key, value in comparison.provenance.items() if key != "command"]


def command(comparison: Comparison) -> str:
    """The command that makes these results again; "" where none was recorded."""
    found = comparison.provenance.get("command", "")
    return found if isinstance(found, str) else shlex.join(map(str, found))


def differences(comparisons: Sequence[Comparison]) -> list[str]:
    """In what the comparisons were measured differently; [] if their numbers can stand side by side."""
    found = [] if len({each.data.sha256 for each in comparisons}) < 2 else ["the text (as token ids)"]
    names = {"bos": "the BOS mode", "bos_token_id": "the BOS token", "lengths": "the context lengths"}
    for field in dataclasses.fields(comparisons[0].protocol):
        values = dict.fromkeys(getattr(each.protocol, field.name) for each in comparisons)
        if len(values) > 1:
            shown = " / ".join(map(_value, values))
            found.append(f"{names.get(field.name, 'the ' + field.name)} ({shown})")
    return found


def _value(value: object) -> str:
    return share(value) if isinstance(value, float) else plain(value)
