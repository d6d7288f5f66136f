"""Running the windows of documents through a model, whatever its memory holds, and past documents that break it."""

from __future__ import annotations

from itertools import groupby
from typing import Literal

import torch
from accelerate.utils.memory import should_reduce_batch_size
from rich.progress import Progress

from hfpos.data.documents import TokenizedDocument
from hfpos.evaluate.journal import Journal, Tallies
from hfpos.evaluate.result import Skipped
from hfpos.evaluate.scoring import TokenScorer
from hfpos.evaluate.tally import Tally
from hfpos.evaluate.windows import Window
from hfpos.scheme import PatchError


CPU_BATCH_TOKENS, BATCH_TOKENS = 1024, 32_768  # where batch_size="auto" begins; a CPU gains nothing by more


class Measurement:
    """Runs the windows of documents in batches and adds their losses up by document.

    Args:
        scorer: runs the model.
        rows: the documents.
        plans: the windows of each of them.
        edges: for each context length, those of its curve's buckets.
        bos_token: put in front of windows that have one.
        batch_size: rows run together, or "auto".
        skip_bad: whether a document with a loss that is not finite is left out; else it is an error.

    Attributes:
        found: the tallies of each finished document, by its number.
        skipped: the documents that were left out.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        rows: list[TokenizedDocument],
        plans: list[list[Window]],
        edges: dict[int, list[int]],
        bos_token: int | None,
        batch_size: int | Literal["auto"],
        skip_bad: bool,
    ) -> None:
        self.scorer = scorer
        self.rows = rows
        self.plans = plans
        self.edges = edges
        self.bos_token = bos_token
        self.adapts = batch_size == "auto"
        self.batch_size = batch_size if batch_size != "auto" else 0
        self.skip_bad = skip_bad
        self.found: dict[int, Tallies] = {}
        self.skipped: list[Skipped] = []

    def run(self, order: list[int], journal: Journal, bar: Progress) -> None:
        """Measure the documents `order`, a few at a time, and write each finished one into the journal."""
        plans = self.plans
        task = bar.add_task("perplexity", total=sum(window.tokens for index in order for window in plans[index]))
        while order:
            longest = max(window.tokens for window in plans[order[0]])
            if self.adapts and not self.batch_size:
                room = CPU_BATCH_TOKENS if self.scorer.device.type == "cpu" else BATCH_TOKENS
                self.batch_size = max(1, room // longest)
            group, order = order[: self.batch_size], order[self.batch_size :]
            new = []
            for index in group:
                known = journal.get(self.rows[index])
                if known is None:
                    new.append(index)
                else:
                    self.found[index] = known
                    bar.advance(task, sum(window.tokens for window in plans[index]))
            tallies: dict[int, Tallies] = {index: {} for index in new}
            jobs = sorted(((index, window) for index in new for window in plans[index]), key=_shape)
            for _, alike in groupby(jobs, key=_shape):
                waiting = list(alike)
                while waiting := [job for job in waiting if job[0] in tallies]:
                    done = self._score(waiting[: self.batch_size], tallies)
                    bar.advance(task, sum(window.tokens for _, window in waiting[:done]))
                    waiting = waiting[done:]
            for index, finished in tallies.items():
                self.found[index] = finished
                journal.add(self.rows[index], finished)

    def _score(self, batch: list[tuple[int, Window]], tallies: dict[int, Tallies]) -> int:
        """Score windows of one shape; how many were scored: none where memory ran out. A bad document leaves `tallies`."""
        ids = torch.stack([self._row(self.rows[index], window) for index, window in batch])
        start = batch[0][1].first_scored + batch[0][1].offset
        try:
            losses = self.scorer.losses(ids, start)
        except Exception as error:
            if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)):
                raise
            if not self.adapts or len(batch) == 1:
                raise PatchError(
                    f"out of memory with {len(batch)} x {ids.shape[1]} tokens; expected room for them: use "
                    + (
                        "a smaller chunk, or a shorter length"
                        if len(batch) == 1
                        else 'batch_size="auto", or a smaller one'
                    )
                ) from error
            self.batch_size = len(batch) // 2
            torch.cuda.empty_cache()
            return 0
        for (index, window), loss in zip(batch, losses, strict=True):
            if index not in tallies:
                continue
            if not bool(loss.isfinite().all()):
                self._refuse(self.rows[index], window, loss, start)
                del tallies[index]
                continue
            for length in window.lengths:
                tally = tallies[index].setdefault(length, Tally())
                part = loss[: length - start]
                tally.add(part, start, self.edges[length], _size(self.rows[index], window, len(part)))
        return len(batch)

    def _row(self, row: TokenizedDocument, window: Window) -> torch.Tensor:
        ids = row.ids[window.begin : window.end]
        return torch.cat((torch.tensor([self.bos_token]), ids)) if window.has_bos else ids

    def _refuse(self, row: TokenizedDocument, window: Window, loss: torch.Tensor, start: int) -> None:
        first = int((~loss.isfinite()).nonzero()[0])
        reason = (
            f"the loss of token {first + start - window.offset} in the window of tokens {window.begin} to {window.end} is "
            f"{loss[first].item()}, not a finite number"
        )
        if not self.skip_bad:
            raise PatchError(
                f"{row.name}: {reason}; if the model overflows in its dtype, load it in float32 or bfloat16, or leave the document out "
                "(skip_bad=True does)"
            )
        self.skipped.append(Skipped(row.name, reason))


def _shape(job: tuple[int, Window]) -> tuple[int, int]:
    """Windows that can be run together: of the same size, scored from the same place."""
    window = job[1]
    return window.tokens, window.first_scored + window.offset


def _size(row: TokenizedDocument, window: Window, tokens: int) -> int | None:
    """The bytes of the first `tokens` tokens that a window scores."""
    if row.token_bytes is None:
        return None
    return int(row.token_bytes[window.first_scored : window.first_scored + tokens].sum())
