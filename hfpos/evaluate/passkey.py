"""The pass key test: a number hidden in filler, to be said at the end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from torch import nn

from hfpos.evaluate.processes import local
from hfpos.evaluate.prompt import SPARE_TOKENS, Speaker, check_room, encoder
from hfpos.evaluate.retrieval import DEPTHS, Job, RetrievalResult, check_count, grid, run_grid


# The wording of Mohtashami and Jaggi 2023, arXiv 2305.16300, which others have used since.
INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
FACT = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
KEYS = range(10_000, 100_000)


def passkey(
    model: nn.Module,
    tokenizer: Any,
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    trials: int = 5,
    max_new_tokens: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
    progress: bool = False,
) -> RetrievalResult:
    """Measure whether a model can say a five-digit number that stood somewhere in a long filler.

    The prompt is the usual one of Mohtashami and Jaggi (arXiv 2305.16300). The model goes on from it greedily; the first number it
    says must be the pass key. At length L the prompt has exactly L - `max_new_tokens` tokens, filler and all: nothing is cut off, and the
    fact is looked for in the decoded prompt.

    Args:
        model: a Transformers causal language model, patched or not, or a wrapper around one (PEFT).
        tokenizer: the model's.
        lengths: tokens of prompt and generation together. A model with rotary positions may be asked beyond its trained length.
        depths: where the fact stands: 0 before all filler, 1 after it.
        trials: prompts for each length and depth, each with its own pass key.
        max_new_tokens: tokens to generate; default: those of a pass key and 8 more.
        seed: of the pass keys.
        bos: whether the prompt begins with the BOS token; default: as the tokenizer does.
        progress: show a progress bar on stderr.

    Raises:
        PatchError: a length that the prompt does not fit into or that the model cannot take, no tokenizer, ...

    >>> from hfpos.data.corpus import train_tokenizer
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    ... )
    >>> tokenizer = train_tokenizer([INTRODUCTION + FILLER + FACT + QUESTION], vocab_size=300)
    >>> result = passkey(LlamaForCausalLM(config), tokenizer, [512], depths=[0.5], trials=1)
    >>> [(cell.length, cell.depth, cell.trials) for cell in result.cells]
    [(512, 0.5, 1)]
    """
    model = local(model)
    encode, start = encoder(tokenizer, bos)
    jobs = grid(lengths, depths, trials)
    keys = {job: job.random(seed).choice(KEYS) for job in jobs}
    facts = {job: FACT.format(key=key) for job, key in keys.items()}
    before, after, filler = start + encode(INTRODUCTION), encode(QUESTION), encode(FILLER)

    answer = max(len(encode(f" {key}")) for key in KEYS[::997])  # of some keys, so that it is the same for every grid
    budget = answer + SPARE_TOKENS if max_new_tokens is None else max_new_tokens
    check_count("max_new_tokens", budget, least=1)
    parts = len(before) + max(len(encode(fact)) for fact in facts.values()) + len(after)
    check_room([job.length for job in jobs], parts, budget, answer)
    speaker = Speaker(model, tokenizer, jobs[-1].length, budget)

    def score(batch: list[Job]) -> list[tuple[int, int]]:
        return [(int(_first(job) == str(keys[job])), 1) for job in batch]

    def _first(job: Job) -> str | None:
        fact = encode(facts[job])
        space = job.length - budget - len(before) - len(fact) - len(after)
        ahead = round(job.depth * space)
        ids = before + _repeated(filler, ahead) + fact + _repeated(filler, space - ahead) + after
        said = speaker.numbers(job, ids, [facts[job]])
        return said[0] if said else None

    settings: dict[str, int | float | str] = {
        "trials": trials,
        "seed": seed,
        "max_new_tokens": budget,
        "bos": "yes" if start else "no",
    }
    return run_grid("passkey", model, jobs, score, chance=1 / len(KEYS), settings=settings, progress=progress)


def _repeated(ids: list[int], count: int) -> list[int]:
    return list(islice(cycle(ids), count))
