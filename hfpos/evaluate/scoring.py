"""The losses of tokens, without ever holding the logits of a whole context.

The decoder runs in pieces through its KV cache; the language modelling head runs on a few of the hidden states at a time. Both are the
model's own forward, so that whatever a family does to its logits (soft cap, scale) and whatever wraps the model (PEFT, device maps) is in force.

Shapes: B batch, L tokens of a row, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hfpos.patching import afresh, causal_model, instead
from hfpos.scheme import PatchError


LOGITS = 2**23  # held at one time: 32 MiB of float32; an accelerator gets four times that, to be busy
MASK_ENTRIES = 2**24  # of a piece that is run against a long cache
WHOLE = 4096  # tokens that are run in one piece: a plain causal kernel without a mask beats any piecewise one


def rows_at_once(vocabulary: int, device: torch.device) -> int:
    """How many tokens may have their logits at one time.

    >>> rows_at_once(32_000, torch.device("cpu"))
    262
    """
    return max(16, (LOGITS if device.type == "cpu" else 4 * LOGITS) // vocabulary)


class TokenScorer:
    """Scores rows of token ids.

    Args:
        model: a causal language model in eval mode, or a wrapper around one.
        chunk: tokens that the decoder runs at a time; chosen by length unless given.
        length_dependent: the model's positions depend on the total length, so every row is run whole.

    Raises:
        PatchError: the model has no language modelling head.
    """

    def __init__(self, model: nn.Module, chunk: int | None, length_dependent: bool) -> None:
        language = causal_model(model)
        self.model = model
        self.chunk = chunk
        self.whole = length_dependent
        self.vocabulary: int = language.config.get_text_config().vocab_size
        first: Any = language.get_input_embeddings().weight
        # weights that were moved off to disk or CPU are on meta here, and their hooks take ids from anywhere
        self.device: torch.device = torch.device("cpu") if first.is_meta else first.device
        self.keeps = "logits_to_keep" in inspect.signature(type(language).forward).parameters
        self.decoder: Any = language.get_decoder()
        self.language = language

    def losses(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Negative log-likelihoods (B, L - start), float64 on the CPU, of ids[:, start:], ids (B, L), given all before them, start >= 1."""
        with torch.no_grad(), afresh(self.language) if self.whole else contextlib.nullcontext():
            return self._losses(ids, start)

    def _losses(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        batch, length = ids.shape
        ids = ids.to(self.device)
        inputs = ids if self.whole else ids[:, :-1]
        pieces = inputs.split(self._piece(batch, length), dim=1)
        if len(pieces) > 1 and not self._abilities[1]:
            raise PatchError(
                f"{type(self.language).__name__} cannot be run in pieces of {self.chunk} tokens: it has no KV cache, or goes on from it with "
                "other logits than in one forward. Leave chunk out, or make it as long as the longest length."
            )
        # one buffer: small blocks of memory between the large ones would split the heap
        losses = torch.empty(batch, length - start, dtype=torch.float64)
        done, cache = 0, None
        for piece in pieces:
            end = done + piece.shape[1]
            spare = end - min(end, length - 1)  # the last token of a row run whole predicts nothing
            wanted = max(0, end - spare - max(done, start - 1))  # how many of the piece's tokens predict a scored one
            logits, cache = self._run(piece, cache, len(pieces) > 1, wanted, spare)
            first = end - spare - wanted + 1
            for part in logits:
                targets = ids[:, first : first + part.shape[1]]
                losses[:, first - start : first - start + part.shape[1]] = self._cross_entropy(part, targets)
                first += part.shape[1]
                del part
            done = end
        return losses

    def _cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Losses (B, n) of logits (B, n, V), in float32, a few rows at a time: its softmax is as large as what it is taken of."""
        rows = max(1, self._step(1) // 8)
        parts = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
        losses = [F.cross_entropy(some.float(), target, reduction="none") for some, target in parts]
        return torch.cat(losses).view_as(targets)

    def _piece(self, batch: int, length: int) -> int:
        """How many tokens the decoder runs at a time."""
        if self.whole:
            return length
        if self.chunk is not None:
            return self.chunk
        if length <= WHOLE and length <= self._step(batch):
            return length
        splits, caches = self._abilities
        if not caches:
            return length
        if not splits:
            return self._step(batch)
        return length if length <= WHOLE else max(256, MASK_ENTRIES // (length * batch))

    def _step(self, batch: int) -> int:
        """How many tokens may have their logits at one time."""
        return rows_at_once(self.vocabulary * batch, self.device)

    def _run(
        self, piece: torch.Tensor, cache: Any, cached: bool, wanted: int, spare: int
    ) -> tuple[Iterator[torch.Tensor], Any]:
        """Run one piece; the logits of its last `wanted` tokens but for `spare` at its end, part by part, and the cache."""
        step = self._step(piece.shape[0])
        kept = wanted + spare
        split = kept > step and self._abilities[0]
        found: list[Any] = []
        hook = self.decoder.register_forward_hook(lambda _, args, output: found.append(output)) if split else None
        keep = {"logits_to_keep": 1 if split else max(kept, 1)} if self.keeps else {}
        try:
            output = self.model(input_ids=piece, past_key_values=cache, use_cache=cached, **keep)
        finally:
            if hook is not None:
                hook.remove()
        cache = output.get("past_key_values") if cached else None
        if not split:
            logits = output.logits[:, output.logits.shape[1] - kept : output.logits.shape[1] - spare]
            return iter((logits,) if wanted else ()), cache
        end = piece.shape[1] - spare
        ranges = [(at, min(at + step, end)) for at in range(end - wanted, end, step)]
        return (self._head(found[0], piece, low, high) for low, high in ranges), cache

    def _head(self, output: Any, ids: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """The logits of the tokens `low` up to `high` of a piece whose decoder output is at hand."""
        part = type(output)(last_hidden_state=output.last_hidden_state[:, low:high])
        with instead(self.decoder, "forward", lambda *args, **kwargs: part):
            return self.model(input_ids=ids[:, low:high], use_cache=False).logits

    @cached_property
    def _abilities(self) -> tuple[bool, bool]:
        """Whether the head gives the same logits on a few hidden states at a time, and the decoder in pieces through its cache."""
        ids = torch.arange(8, device=self.device)[None] % self.vocabulary
        found: list[Any] = []
        hook = self.decoder.register_forward_hook(lambda _, args, output: found.append(output))
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
            first = self.model(input_ids=ids[:, :5], use_cache=True)
        finally:
            hook.remove()
        return self._head_divides(found, ids, logits), self._cache_continues(first, ids, logits)

    def _head_divides(self, found: list[Any], ids: torch.Tensor, logits: torch.Tensor) -> bool:
        compiled = any(
            hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in self.model.modules()
        )
        hidden = getattr(found[0], "last_hidden_state", None) if len(found) == 2 else None
        if not self.keeps or compiled or self.decoder is self.language or hidden is None:
            return False
        return _alike([self._head(found[0], ids, low, high) for low, high in ((0, 3), (3, 8))], logits)

    def _cache_continues(self, first: Any, ids: torch.Tensor, logits: torch.Tensor) -> bool:
        """Some hybrid models begin their recurrent state anew in a second piece of several tokens."""
        cache = first.get("past_key_values")
        if cache is None:
            return False
        second = self.model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True)
        return _alike([first.logits, second.logits], logits)


def _alike(parts: list[torch.Tensor], whole: torch.Tensor) -> bool:
    found, expected = torch.cat(parts, dim=1).float(), whole.float()
    tolerance = 0.05 if whole.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
