"""The options that the measuring commands share: how they are read, and what they are called."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from hfpos.scheme import PatchError


def parse_lengths(text: str) -> list[int]:
    """Context lengths; k is 1,024.

    >>> parse_lengths("512,1k,2k")
    [512, 1024, 2048]
    """
    found = []
    for part in text.split(","):
        number, times = (part.strip()[:-1], 1024) if part.strip().lower().endswith("k") else (part.strip(), 1)
        if not number.isdecimal():
            raise PatchError(f"lengths={text!r}: {part.strip()!r} is not a number of tokens; expected e.g. 512,1k,2k")
        found.append(int(number) * times)
    return found


def parse_stride(text: str) -> int | str:
    """A number of tokens, or `window`."""
    return text if text == "window" else parse_lengths(text)[0]


def parse_batch_size(text: str) -> int | str:
    """A number of rows, or `auto`."""
    if text != "auto" and not text.isdecimal():
        raise PatchError(f"batch_size={text!r}: expected a whole number of 1 or more, or 'auto'")
    return text if text == "auto" else int(text)


def parse_depths(text: str) -> list[float]:
    """Shares of the context with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise PatchError(f"depths={text!r}: expected numbers from 0 to 1 with commas between them") from error


def parse_share(text: str) -> float:
    """A share, as `1%` or `0.01`.

    >>> parse_share("1%"), parse_share("0.02")
    (0.01, 0.02)
    """
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise PatchError(f"{text!r} is not a share; expected e.g. 1% or 0.01")
    return share


Model = Annotated[str, typer.Argument(help="Folder or hub name of a model or PEFT adapter, or a .gguf file.")]
Text = Annotated[
    str,
    typer.Option("--data", help="A text file, .jsonl(.gz), a folder, `stdlib`, or a data set for `datasets`."),
]
Lengths = Annotated[
    Any,
    typer.Option(
        parser=parse_lengths, metavar="TOKENS", help="Context lengths, BOS included, e.g. 512,1k,2k (k = 1,024)."
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of the data set, e.g. test.")]
Column = Annotated[str, typer.Option(help="Field or column that holds the text.")]
MinTokens = Annotated[int, typer.Option(help="Leave shorter documents out.")]
MaxTokens = Annotated[int | None, typer.Option(help="Keep only the first so many tokens of each document.")]
Blocks = Annotated[
    bool, typer.Option("--blocks", help="Cut documents into blocks of the longest length, each a document of its own.")
]
MaxDocuments = Annotated[int | None, typer.Option(help="Measure only so many documents (or blocks).")]
DrawSeed = Annotated[int | None, typer.Option(help="Draw these at random with this seed; else the first ones.")]
Stride = Annotated[
    Any,
    typer.Option(
        parser=parse_stride,
        metavar="TOKENS",
        help="Slide windows by so many tokens, or `window` for disjoint ones; else each document's first tokens only.",
    ),
]
BosWord = Literal["every-window", "first", "none"]
Bos = Annotated[
    BosWord, typer.Option(help="Where to put a BOS token: every-window, first (of each document) or none.")
]
BosId = Annotated[int | None, typer.Option(help="The BOS token; the model's own unless given.")]
AggregateWord = Literal["tokens", "windows"]
Aggregate = Annotated[AggregateWord, typer.Option(help="tokens, or windows for the mean of the windows' means.")]
BatchSize = Annotated[
    Any,
    typer.Option(parser=parse_batch_size, metavar="ROWS", help="Rows run together; auto halves when memory runs out."),
]
Chunk = Annotated[int | None, typer.Option(help="Tokens that go through the model at a time.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Go on past bad documents, and list them.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Of whatever is drawn.")]
Tolerance = Annotated[
    Any,
    typer.Option(
        parser=parse_share,
        metavar="SHARE",
        help="Effective context: how much worse than the best shorter length is still held.",
    ),
]
MaxRegression = Annotated[
    Any,
    typer.Option(
        parser=parse_share,
        metavar="SHARE",
        help="Exit with 1 if a scheme costs more than this at or below the trained length, e.g. 1%.",
    ),
]
Depths = Annotated[
    Any, typer.Option(parser=parse_depths, metavar="SHARES", help="Where the fact stands, from 0 (start) to 1 (end).")
]
Trials = Annotated[int, typer.Option(help="Prompts for each length and depth.")]
SchemeName = Annotated[
    str | None, typer.Option("--scheme", help="Patch the model first; the scheme's parameters as further options.")
]
Haystack = Annotated[str | None, typer.Option(help="Text to hide needles in: a file, .jsonl(.gz) or folder.")]
