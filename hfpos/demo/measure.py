"""The measuring part of the demo: one model, the same held-out text, one scheme after the other."""

import contextlib
import random
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel

from hfpos.data import blocks
from hfpos.demo.options import DemoOptions
from hfpos.evaluate import PerplexityResult, RetrievalResult, key_value, perplexity
from hfpos.patching import patched
from hfpos.scheme import PatchError


UNPATCHED = "none"
SCALINGS = ("linear", "ntk", "yarn")  # what the model knows, stretched: may work without training
GROUPED = (
    "self_extend"  # nothing stretched: far positions shared by neighbours, at more time a token; is not fine-tuned
)
PAIRS = 8  # of a key and a value in each context; guessing finds one in eight
ALIBI = "alibi"  # other positions than the model was trained with: cannot


def context_lengths(trained: int, factor: float) -> list[int]:
    """Half the trained length, then doubling, up to exactly `factor` times it.

    >>> context_lengths(128, 4), context_lengths(128, 3)
    ([64, 128, 256, 512], [64, 128, 256, 384])
    """
    longest = round(trained * factor)
    doubling = [trained * 2**octave // 2 for octave in range(longest.bit_length())]
    return [length for length in doubling if length < longest] + [longest]


def held_out_pieces(options: DemoOptions, documents: list[list[int]], length: int) -> list[list[int]]:
    """Pieces of exactly `length` held-out tokens, drawn over all documents."""
    pieces = blocks(documents, length)
    if not pieces:
        raise PatchError(
            f"no held-out document has {length} tokens (the longest: {max(map(len, documents))}), so that length cannot "
            "be measured; give longer documents (`text`) or a smaller `factor`"
        )
    return random.Random(options.seed).sample(pieces, min(len(pieces), max(1, options.eval_tokens // length)))


def measure(model: PreTrainedModel, pieces: list[list[int]], lengths: list[int]) -> PerplexityResult:
    """Perplexity at every length."""
    return perplexity(model, pieces, lengths)


def measure_schemes(
    model: PreTrainedModel, pieces: list[list[int]], lengths: list[int], factor: float
) -> tuple[dict[str, PerplexityResult], dict[str, str]]:
    """Return the scores by scheme, and why each of the others does not fit this model."""
    scores, refused = {UNPATCHED: measure(model, pieces, lengths)}, {}
    for name in track((*SCALINGS, GROUPED, ALIBI), "measuring", console=Console(stderr=True)):
        parameters = {} if name == ALIBI else {"factor": factor}
        try:
            with patched(model, name, **parameters):
                scores[name] = measure(model, pieces, lengths)
        except PatchError as error:
            refused[name] = str(error)
    return scores, refused


def measure_recall(
    options: DemoOptions, model: PreTrainedModel, lengths: list[int], names: Sequence[str]
) -> dict[str, RetrievalResult]:
    """Recall of key-value pairs under each scheme, at the lengths that they fit into, about `eval_tokens` at the longest."""
    fitting = [length for length in lengths if length >= 2 * PAIRS + 3]
    depths = (0.0, 0.5, 1.0)
    trials = max(1, min(40, options.eval_tokens // (len(depths) * lengths[-1])))
    found = {}
    for name in track(names if fitting else (), "recalling", console=Console(stderr=True)):
        with contextlib.nullcontext() if name == UNPATCHED else patched(model, name, factor=options.factor):
            found[name] = key_value(model, fitting, pairs=PAIRS, depths=depths, trials=trials)
    return found


def best_scaling(scores: dict[str, PerplexityResult], refused: dict[str, str]) -> str:
    """The scaling with the lowest perplexity at the greatest length."""
    fitting = [name for name in SCALINGS if name in scores]
    if not fitting:
        raise PatchError(f"no scaling of rotary positions fits this model: {refused[SCALINGS[0]]}")
    return min(fitting, key=lambda name: list(curve(scores[name]).values())[-1])


def curve(result: PerplexityResult) -> dict[int, float]:
    """Perplexity by context length."""
    return {length: score.perplexity for length, score in result.by_length.items()}
