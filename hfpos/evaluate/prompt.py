"""Prompts of an exact number of tokens, and a model's own words after one, for the retrieval tests that are asked in language."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from hfpos.evaluate.arguments import depends_on_length
from hfpos.evaluate.retrieval import Job
from hfpos.patching import causal_model
from hfpos.scheme import PatchError


PREFILL_CHUNK = 2048  # tokens of a prompt that go through the model at a time
SPARE_TOKENS = 8  # generated beyond the answer's own: a model may begin with a space, a colon or a few words
_REMINDERS = logging.getLogger("transformers.generation.stopping_criteria")


def encoder(tokenizer: Any, bos: bool | None) -> tuple[Callable[[str], list[int]], list[int]]:
    """What turns a text into ids without special tokens, and the ids that a prompt begins with: BOS, or none.

    Args:
        bos: None does as the tokenizer itself does.
    """
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise PatchError(
            f"tokenizer={tokenizer!r}: expected the model's tokenizer, e.g. AutoTokenizer.from_pretrained(...)"
        )

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    found = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        bos = found is not None and list(tokenizer("a")["input_ids"])[:1] == [found]
    if not bos:
        return encode, []
    if found is None:
        raise PatchError("bos=True, but the tokenizer has no BOS token; leave bos out, or set tokenizer.bos_token")
    return encode, [found]


def check_room(lengths: list[int], parts: int, max_new_tokens: int, answer: int) -> None:
    """Raise `PatchError` where the prompt's parts (tokens, without filler) and the answer do not fit into the shortest length."""
    if max_new_tokens < answer:
        raise PatchError(
            f"max_new_tokens={max_new_tokens}: the answer alone may take {answer} tokens; expected that many or more"
        )
    smallest = parts + max_new_tokens
    if min(lengths) < smallest:
        raise PatchError(
            f"lengths: the prompt without any filler has {parts} tokens and {max_new_tokens} are to be generated, which does not fit into "
            f"{min(lengths)}; expected {smallest} or more"
        )


class Speaker:
    """A model and its tokenizer, asked one prompt at a time, greedily and by no setting of the model's own."""

    def __init__(self, model: nn.Module, tokenizer: Any, longest: int, max_new_tokens: int) -> None:
        self.language = causal_model(model)
        # PEFT's own where there is one: prompt tuning acts there; a wrapper without one has the model's
        self.generate: Any = getattr(model, "generate", self.language.generate)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.vocabulary = self.language.config.get_text_config().vocab_size
        # positions that depend on the length of a forward allow no pieces
        self.in_pieces = not depends_on_length(model, longest)

    def numbers(self, job: Job, ids: list[int], facts: list[str]) -> list[str]:
        """The whole numbers in what the model says after the prompt `ids`, in order.

        Raises `PatchError` where the prompt and the answer are not `job.length` tokens, or `facts` do not stand in the prompt.
        """
        self._check(job, ids, facts)
        prompt = torch.tensor([ids], device=self.language.device)
        ends = getattr(self.language.generation_config, "eos_token_id", None) or self.tokenizer.eos_token_id
        first_end = ends[0] if isinstance(ends, list) else ends
        pad = next((each for each in (self.tokenizer.pad_token_id, first_end) if each is not None), 0)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=ends,
            pad_token_id=pad,
            prefill_chunk_size=PREFILL_CHUNK if self.in_pieces and len(ids) > PREFILL_CHUNK else None,
        )
        with _on_these_settings_alone(self.language):
            output = self.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
        said = self.tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True)
        return re.findall(r"\d+", said)

    def _check(self, job: Job, ids: list[int], facts: list[str]) -> None:
        if len(ids) + self.max_new_tokens != job.length:
            raise PatchError(f"the prompt at {job} has {len(ids)} tokens, expected {job.length - self.max_new_tokens}")
        if max(ids) >= self.vocabulary:
            raise PatchError(
                f"the prompt at {job} has the id {max(ids)}; expected 0 to {self.vocabulary - 1}, the model's vocabulary. Is it another "
                "model's tokenizer?"
            )
        text = _even_spaces(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        for fact in facts:
            if fact not in text:
                raise PatchError(
                    f"the prompt at {job} does not read {fact!r} when its tokens are decoded; expected a tokenizer that can write "
                    "English sentences and numbers"
                )


@contextlib.contextmanager
def _on_these_settings_alone(model: PreTrainedModel) -> Iterator[None]:
    """What a call leaves open is filled in from the model's own generation settings, so these are put aside.

    So is the reminder that the model's length is exceeded: here that is asked for.
    """
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    _REMINDERS.addFilter(_drop)
    try:
        yield
    finally:
        _REMINDERS.removeFilter(_drop)
        model.generation_config = kept


def _drop(record: logging.LogRecord) -> bool:
    return False


def _even_spaces(text: str) -> str:
    return " ".join(text.split())
