"""Associative recall of random tokens: whether a model can look up in its context, without knowing any language."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hfpos.evaluate.arguments import depends_on_length
from hfpos.evaluate.processes import local
from hfpos.evaluate.retrieval import DEPTHS, Job, RetrievalResult, check_count, grid, run_grid
from hfpos.patching import causal_model
from hfpos.scheme import PatchError


BATCH_TOKENS = 8192


def key_value(
    model: nn.Module,
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    pairs: int = 8,
    trials: int = 20,
    seed: int = 0,
    vocabulary: Iterable[int] | None = None,
    progress: bool = False,
) -> RetrievalResult:
    """Measure whether a model finds the value that stood behind a key earlier in its context.

    A context is random tokens; among them stand `pairs` pairs of a key and a value, one token each; the last token is one of the keys
    again. The answer is right if, of the values in the context, the right one has the highest logit, so guessing finds 1 / pairs.
    No token is key, value and noise at once. A model needs no language for this, but it needs to have learned to copy what followed the
    same token before. The smallest language models have not, and then guess at every length: `copying` gives rows to teach it with.

    Args:
        model: a Transformers causal language model, patched or not, or a wrapper around one (PEFT).
        lengths: tokens of a context, the question at its end included.
        depths: where the pair that is asked for stands: 0 at the start of the context, 1 right before the question.
        pairs: pairs in each context, 2 or more.
        trials: contexts for each length and depth.
        seed: of keys, values, noise and their places.
        vocabulary: the token ids to use; default: all that the model has, without the special ones its config names.
        progress: show a progress bar on stderr.

    Raises:
        PatchError: a length that the pairs do not fit into or that the model cannot take, too small a vocabulary, ...

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    ... )
    >>> result = key_value(LlamaForCausalLM(config), [32, 64], depths=[0.5], trials=10)
    >>> result.chance, [(cell.length, cell.trials) for cell in result.cells]
    (0.125, [(32, 10), (64, 10)])
    """
    model = local(model)
    check_count("pairs", pairs, least=2)
    jobs = grid(lengths, depths, trials)
    smallest = 2 * pairs + 3  # with the question, and room to move the pairs to every depth
    if jobs[0].length < smallest:
        raise PatchError(
            f"lengths: {pairs} pairs and the question do not fit into {jobs[0].length} tokens at every depth; "
            f"expected {smallest} or more"
        )
    language = causal_model(model)
    ids = _usable_ids(language, vocabulary, least=2 * pairs + 1)
    depends_on_length(model, jobs[-1].length)  # refuses what is longer than a table of positions
    # memory: the logits of the last position are all that is looked at
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(language.forward).parameters else {}

    def score(batch: list[Job]) -> list[tuple[int, int]]:
        contexts = [_context(job, pairs, ids, job.random(seed)) for job in batch]
        rows = torch.tensor([row for row, _, _ in contexts], device=language.device)
        logits = model(input_ids=rows, use_cache=False, **keep).logits[:, -1].float()
        values = torch.tensor([values for _, values, _ in contexts], device=logits.device)
        shown = logits.gather(1, values)
        for job, row in zip(batch, shown, strict=True):
            if not bool(row.isfinite().all()):
                raise PatchError(
                    f"key_value: the logits at {job} are not finite numbers; if the model overflows in its dtype, load it in "
                    "float32 or bfloat16"
                )
        return [
            (int(best == asked), 1) for best, (_, _, asked) in zip(shown.argmax(1).tolist(), contexts, strict=True)
        ]

    settings: dict[str, int | float | str] = {"pairs": pairs, "trials": trials, "seed": seed, "vocabulary": len(ids)}
    return run_grid(
        "key_value",
        model,
        jobs,
        score,
        chance=1 / pairs,
        settings=settings,
        batch_tokens=BATCH_TOKENS,
        progress=progress,
    )


def copying(count: int, length: int, vocabulary: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    """Rows of random tokens that repeat themselves, to teach a small model what `key_value` asks for.

    Args:
        count: rows.
        length: tokens of a row. It is a stretch of a sixteenth to a quarter of that, over and over: short, so that most of it can be
            predicted.
        vocabulary: the ids to draw from.
        seed: another seed draws other rows.

    >>> copying(1, 16, vocabulary=range(10), seed=1)
    [[5, 8, 5, 8, 5, 8, 5, 8, 5, 8, 5, 8, 5, 8, 5, 8]]
    """
    numbers = random.Random(seed)
    rows = []
    for _ in range(count):
        stretch = numbers.choices(vocabulary, k=numbers.randint(max(1, length // 16), max(1, length // 4)))
        rows.append([stretch[place % len(stretch)] for place in range(length)])
    return rows


def _context(job: Job, pairs: int, ids: list[int], numbers: random.Random) -> tuple[list[int], list[int], int]:
    """The tokens of a context, the values in it, and which of them is asked for."""
    drawn = numbers.sample(ids, min(len(ids), 2 * pairs + job.length))
    keys, values, noise = drawn[:pairs], drawn[pairs : 2 * pairs], drawn[2 * pairs :]
    row = numbers.choices(noise, k=job.length)
    asked = numbers.randrange(pairs)
    place = round(
        job.depth * (job.length - 3)
    )  # the last token is the question, the two before it the last place for a pair
    others = [*range(0, place - 1, 2), *range(place + 2, job.length - 2, 2)]
    places = numbers.sample(others, pairs - 1)
    places.insert(asked, place)
    for start, key, value in zip(places, keys, values, strict=True):
        row[start : start + 2] = key, value
    row[-1] = keys[asked]
    return row, values, asked


def _usable_ids(language: PreTrainedModel, given: Iterable[int] | None, least: int) -> list[int]:
    """The ids to draw from, in order."""
    text = language.config.get_text_config()
    wanted = set(range(text.vocab_size) if given is None else given)
    foreign = [
        each
        for each in wanted
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < text.vocab_size
    ]
    if foreign:
        raise PatchError(
            f"vocabulary has {foreign[0]!r}; expected ids from 0 to {text.vocab_size - 1}, the model's own"
        )
    special: set[int] = set()
    for config in (language.config, text, language.generation_config):
        for name, value in (config.to_dict() if config is not None else {}).items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    found = sorted(wanted - special)
    if len(found) < least:
        raise PatchError(
            f"vocabulary: {len(found)} ids that are not special, expected {least} or more: a key and a value for each pair, and noise"
        )
    return found
