"""Perplexity of a causal model against context length, every token scored once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.nn import functional as F

from hfpos.describe import describe
from hfpos.patching import language_model
from hfpos.scheme import PatchError


@dataclass(frozen=True)
class LengthScore:
    """What was measured at one context length; `nll` is the mean over tokens, in nats, and `perplexity` its exp."""

    perplexity: float
    nll: float
    tokens: int
    documents: int


@dataclass(frozen=True)
class PerplexityResult:
    """Scores by context length, shortest first; `str()` is a table."""

    by_length: dict[int, LengthScore]

    def __str__(self) -> str:
        lines = [f"{'length':>8} {'perplexity':>11} {'nll':>8} {'tokens':>10} {'documents':>10}"]
        for length, score in self.by_length.items():
            lines.append(
                f"{length:>8} {score.perplexity:>11.4g} {score.nll:>8.4f} {score.tokens:>10,} {score.documents:>10,}"
            )
        return "\n".join(lines)


def perplexity(
    model: nn.Module,
    documents: Sequence[Sequence[int] | torch.Tensor],
    lengths: Sequence[int],
    *,
    bos: Literal["none", "every-window"] = "none",
    bos_token_id: int | None = None,
    batch_size: int = 1,
    chunk: int = 1024,
    progress: bool = False,
) -> PerplexityResult:
    """Measure perplexity on the first L tokens of each document, for every requested length L.

    The perplexity is exp(sum of negative log-likelihoods / tokens scored), over all documents of at least L tokens;
    shorter ones do not count for that L. The first token has nothing before it and is not scored.

    A causal model whose positions do not depend on the total length is run once per document, at the longest
    length, and every shorter one is a prefix sum of that run. A model whose positions do depend on it (`dynamic`,
    `longrope`) is run once per length.

    Args:
        model: a Transformers causal language model, patched or not, or a wrapper around one (PEFT). It is put in
            eval mode for the measurement.
        documents: token ids, one list or 1-D tensor a document.
        lengths: context lengths in tokens, 2 or more.
        bos: "every-window" puts the BOS token before each document that does not start with it (it then counts as
            the first of the L tokens); "none" scores the ids as they are given.
        bos_token_id: the BOS token for `bos="every-window"`; default: the one in the model's config.
        batch_size: documents run together. It changes speed and memory, not the result.
        chunk: tokens whose logits exist at one time, so memory does not grow with length x vocabulary. Longer
            inputs go through the KV cache in pieces of this size.
        progress: show a progress bar on stderr.

    Raises:
        PatchError: a length no document reaches, ids outside the vocabulary, a loss that is not finite, ...

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    ... )
    >>> result = perplexity(LlamaForCausalLM(config), [range(32), range(16)], lengths=[8, 32])
    >>> [(length, score.tokens, score.documents) for length, score in result.by_length.items()]
    [(8, 14, 2), (32, 31, 1)]
    """
    if batch_size < 1 or chunk < 1:
        raise PatchError(f"batch_size={batch_size}, chunk={chunk}: expected 1 or more for both")
    language = language_model(model)
    if language.get_output_embeddings() is None:
        raise PatchError(
            f"{type(language).__name__} has no language modelling head; load it with AutoModelForCausalLM"
        )
    rows = _check_documents(documents, vocabulary=language.config.get_text_config().vocab_size)
    if bos == "every-window":
        rows = _with_bos(rows, _bos_id(language.config.get_text_config().bos_token_id, bos_token_id))
    elif bos != "none" or bos_token_id is not None:
        raise PatchError(
            f'bos={bos!r}, bos_token_id={bos_token_id}: expected bos="every-window", with or without an id, or '
            'bos="none" without'
        )
    lengths = _check_lengths(lengths, longest=max(len(row) for row in rows))
    length_dependent = _check_positions(model, longest=lengths[-1])
    runs = _plan_runs(rows, lengths, every_length=length_dependent)

    sums = dict.fromkeys(lengths, 0.0)
    counts = dict.fromkeys(lengths, 0)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with Progress(console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("perplexity", total=sum(length for _, length in runs))
            for length, batch in _batches(runs, batch_size):
                served = [length] if length_dependent else [short for short in lengths if short <= length]
                ids = torch.stack([rows[index][:length] for index in batch]).to(language.device)
                losses = _token_losses(model, ids, chunk, length_dependent)
                for short in served:
                    sums[short] += losses[:, : short - 1].sum().item()
                    counts[short] += len(batch)
                bar.advance(task, ids.numel())
    finally:
        for module, training in modes.items():
            module.training = training
    return PerplexityResult({length: _score(length, sums[length], counts[length]) for length in lengths})


def _token_losses(model: nn.Module, ids: torch.Tensor, chunk: int, length_dependent: bool) -> torch.Tensor:
    """Negative log-likelihood of ids[:, 1:] given what stands before: (batch, length) -> (batch, length - 1)."""
    forward = _logits_whole if length_dependent else _logits_cached
    targets = ids[:, 1:].split(chunk, dim=1)
    losses = []
    with torch.no_grad():
        for logits, target in zip(forward(model, ids, chunk), targets, strict=True):
            losses.append(F.cross_entropy(logits.float().transpose(1, 2), target, reduction="none").double().cpu())
    return torch.cat(losses, dim=1)


def _logits_cached(model: nn.Module, ids: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    """Yield the logits of ids[:, :-1] chunk by chunk, each token run once, earlier chunks read from the KV cache.

    This is the model's own forward, so that what a family does to its logits (soft cap, scale) is never lost.
    """
    pieces = ids[:, :-1].split(chunk, dim=1)
    cache = None
    for piece in pieces:
        output = model(input_ids=piece, past_key_values=cache, use_cache=len(pieces) > 1)
        cache = output.get("past_key_values")
        if cache is None and len(pieces) > 1:
            raise PatchError(
                f"{type(model).__name__} returned no KV cache, so {ids.shape[1]} tokens cannot be run in pieces of "
                f"{chunk}: expected a model with past_key_values. Use chunk={ids.shape[1]}."
            )
        yield output.logits


def _logits_whole(model: nn.Module, ids: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
    """Yield the same, always running all of `ids` at once: the total length is part of these models' positions."""
    for kept in torch.arange(ids.shape[1] - 1, device=ids.device).split(chunk):
        yield model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits


def _plan_runs(rows: list[torch.Tensor], lengths: list[int], every_length: bool) -> list[tuple[int, int]]:
    """Return (document, length to run it at), sorted by length."""
    runs = []
    for index, row in enumerate(rows):
        reached = [length for length in lengths if length <= len(row)]
        runs += [(index, length) for length in (reached if every_length else reached[-1:])]
    return sorted(runs, key=lambda run: run[1])


def _batches(runs: list[tuple[int, int]], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Group runs of the same length, so that no batch needs padding."""
    for length, group in groupby(runs, key=lambda run: run[1]):
        indices = [index for index, _ in group]
        for start in range(0, len(indices), batch_size):
            yield length, indices[start : start + batch_size]


def _score(length: int, nll_sum: float, documents: int) -> LengthScore:
    tokens = documents * (length - 1)
    nll = nll_sum / tokens
    if not math.isfinite(nll):
        raise PatchError(
            f"the loss at length {length} is {nll}, not a finite number; if the model overflows in its dtype, "
            "load it in float32 or bfloat16"
        )
    return LengthScore(
        perplexity=math.exp(nll) if nll < 700 else math.inf, nll=nll, tokens=tokens, documents=documents
    )


def _check_documents(documents: Sequence[Sequence[int] | torch.Tensor], vocabulary: int) -> list[torch.Tensor]:
    rows = []
    for index, document in enumerate(documents):
        if isinstance(document, (str, int)):
            raise PatchError(
                f"document {index} is a {type(document).__name__}: expected a list of token ids for each document. "
                "Tokenise text first, and put a single document into a list."
            )
        row = torch.as_tensor(document).cpu()
        if row.ndim != 1 or (row.is_floating_point() and len(row)):
            raise PatchError(f"document {index} is a {row.dtype} of shape {tuple(row.shape)}: expected 1-D integers.")
        if len(row) and not 0 <= int(row.min()) <= int(row.max()) < vocabulary:
            raise PatchError(
                f"document {index} has ids from {int(row.min())} to {int(row.max())}: expected 0 to {vocabulary - 1}, "
                "the model's vocabulary. Was it tokenised with another model's tokenizer?"
            )
        rows.append(row.long())
    if not rows:
        raise PatchError("no documents; expected at least one list of token ids")
    return rows


def _check_lengths(lengths: Sequence[int], longest: int) -> list[int]:
    if not lengths or any(isinstance(length, bool) or not isinstance(length, int) or length < 2 for length in lengths):
        raise PatchError(
            f"lengths={lengths!r}: expected whole numbers of 2 tokens or more, e.g. lengths=[2048, 4096]."
        )
    if max(lengths) > longest:
        raise PatchError(
            f"no document reaches length {max(lengths)}: the longest has {longest} tokens. Ask for {longest} at most, "
            "or give longer documents."
        )
    return sorted(set(lengths))


def _check_positions(model: nn.Module, longest: int) -> bool:
    """Return whether the model's positions depend on the total length."""
    try:
        found = describe(model)
    except PatchError:
        return True  # not a family hfpos knows: one run per length is right for any model
    if found.scheme == "learned" and found.patched_length is not None and longest > found.patched_length:
        raise PatchError(
            f"{found.model} has {found.patched_length} learned positions, {longest} were asked for; patch it to a longer "
            f'table first: hfpos.patch(model, "learned", target_length={longest})'
        )
    return found.length_dependent


def _bos_id(of_config: int | None, given: int | None) -> int:
    found = of_config if given is None else given
    if found is None:
        raise PatchError(
            'bos="every-window", but the config of the model has no bos_token_id; pass bos_token_id=... or bos="none"'
        )
    return found


def _with_bos(rows: list[torch.Tensor], bos: int) -> list[torch.Tensor]:
    start = torch.tensor([bos])
    return [row if row[:1].tolist() == [bos] else torch.cat([start, row]) for row in rows]
