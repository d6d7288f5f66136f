"""Samples to batches, for any Trainer or loop: plain, or with positions that reach beyond the tokens (PoSE, randomised positions)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from hfpos.scheme import PatchError


_NEEDED, _KNOWN = {"input_ids", "labels"}, {"input_ids", "labels", "position_ids"}


class Collator:
    """Stacks samples of one length.

    A sample has `input_ids` and `labels`, and may have `position_ids` (of packed documents, say); L numbers each, as a list, an array
    or a tensor. The batch has the same names; each is an int64 tensor (B, L). The first label of a row becomes -100: nothing predicts it,
    and Trainer counts the tokens of a step by their labels.

    Args:
        counted: give samples without `position_ids` those from 0 on, for engines that share a row among processes.

    >>> Collator()([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}])
    {'input_ids': tensor([[5, 6],
            [7, 8]]), 'labels': tensor([[-100,    6],
            [-100,    8]])}
    """

    def __init__(self, counted: bool = False) -> None:
        self.counted = counted

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of `samples`.

        Raises:
            PatchError: no samples, names missing or unknown, or samples of several lengths.
        """
        found = sorted({tuple(sorted(sample)) for sample in samples})
        if len(found) != 1 or not _NEEDED <= set(found[0]) <= _KNOWN:
            raise PatchError(
                f"{len(samples)} samples with {' and with '.join(map(', '.join, found)) or 'nothing'}; expected input_ids, labels and, "
                "in all or none of them, position_ids: drop other columns, and cut windows of one length instead of padding"
            )
        rows = {name: [torch.as_tensor(sample[name], dtype=torch.int64) for sample in samples] for name in found[0]}
        shapes = {tuple(row.shape) for given in rows.values() for row in given}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise PatchError(
                f"samples of shapes {', '.join(map(str, sorted(shapes)))} in one batch; expected one length: cut the text into windows of "
                "equal length, e.g. with hfpos.data.blocks"
            )
        batch = {name: torch.stack(given) for name, given in rows.items()}
        batch["labels"][:, 0] = -100
        if self.counted and "position_ids" not in batch:
            batch["position_ids"] = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"]).clone()
        return batch


class _Jumping(Collator):
    """Gives each sample positions of its own, which depend on nothing but the seed, the epoch and its tokens."""

    def __init__(self, target_length: int, seed: int) -> None:
        super().__init__()
        _require("target_length", target_length, least=2)
        _require("seed", seed, least=0)
        self.target_length, self.seed = target_length, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # what loader processes that live on see, too

    def set_epoch(self, epoch: int) -> None:
        """Draw other positions for the same tokens from now on. Call it before each epoch, e.g. from a callback's `on_epoch_begin`;
        without it, every epoch gets the positions of the first."""
        _require("epoch", epoch, least=0)
        self._epoch.fill_(epoch)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch, with `position_ids` and an `attention_mask` of ones, int64 (B, L).

        Raises:
            PatchError: as `Collator`; also samples longer than target_length, or of several packed documents.
        """
        batch = super().__call__(samples)
        ids = batch["input_ids"]
        length = ids.shape[1]
        if length > self.target_length:
            raise PatchError(
                f"samples of {length} tokens do not fit into target_length={self.target_length}; expected a target beyond the samples: "
                "raise it, or cut shorter windows"
            )
        given = batch.get("position_ids")
        if given is not None and not bool((given == torch.arange(length)).all()):
            raise PatchError(
                f"{type(self).__name__} got position_ids other than 0 to {length - 1} (documents packed into one sample?); expected one "
                "document a window: pack as blocks"
            )
        positions = np.stack([self._positions(length, self._generator(row)) for row in ids.numpy()])
        # Without a mask, and without a cache, Transformers takes a jump for the border of a packed document.
        return batch | {"position_ids": torch.from_numpy(positions), "attention_mask": torch.ones_like(ids)}

    def _generator(self, ids: np.ndarray) -> np.random.Generator:
        """The same for a sample in any process, worker or resumed run."""
        key = f"{type(self).__name__} {self.seed} {int(self._epoch)} ".encode() + ids.astype("<i8").tobytes()
        return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little"))

    def _positions(self, length: int, draw: np.random.Generator) -> np.ndarray:
        raise NotImplementedError


class PoseCollator(_Jumping):
    """PoSE: a short window is cut into chunks, and positions are left out between them, so that all distances up to the target occur.

    Paper: Zhu et al., arXiv 2309.10400. Chunk 1 starts at position 0. Each later chunk skips positions; the skips are uniform in
    0 ... target_length - L, in rising order, so the largest position is at most target_length - 1. All chunks but the last have 1 to
    ceil(L / chunks) tokens, the authors' rule for 2 chunks. The authors also take later chunks from elsewhere in a longer document;
    here a window's text stays in one piece.

    Args:
        target_length: the context to train for, in tokens.
        chunks: 2 or more; the paper uses 2.
        seed: of the cuts and skips.

    >>> batch = PoseCollator(64)([{"input_ids": [3, 1, 4, 1, 5, 9], "labels": [3, 1, 4, 1, 5, 9]}])
    >>> batch["position_ids"]
    tensor([[ 0, 50, 51, 52, 53, 54]])
    """

    def __init__(self, target_length: int, chunks: int = 2, seed: int = 0) -> None:
        super().__init__(target_length, seed)
        _require("chunks", chunks, least=2)
        self.chunks = chunks

    def _positions(self, length: int, draw: np.random.Generator) -> np.ndarray:
        if length < self.chunks:
            raise PatchError(
                f"samples of {length} tokens cannot be cut into {self.chunks} chunks; expected at least a token for each"
            )
        sizes: list[int] = []
        for later in range(self.chunks - 1, 0, -1):
            most = min(-(-length // self.chunks), length - sum(sizes) - later)
            sizes.append(int(draw.integers(1, most, endpoint=True)))
        sizes.append(length - sum(sizes))
        skips = np.sort(draw.integers(0, self.target_length - length, size=self.chunks - 1, endpoint=True))
        return np.arange(length) + np.repeat(np.concatenate(([0], skips)), sizes)


class RandomPositionCollator(_Jumping):
    """Randomised positions: each window gets L different positions of the target, in rising order.

    Paper: Ruoss et al., arXiv 2305.16843.

    Args:
        target_length: positions are drawn from 0 ... target_length - 1.
        seed: of the draw.

    >>> batch = RandomPositionCollator(64)([{"input_ids": [3, 1, 4, 1, 5, 9], "labels": [3, 1, 4, 1, 5, 9]}])
    >>> batch["position_ids"]
    tensor([[ 0, 13, 25, 46, 50, 51]])
    """

    def __init__(self, target_length: int, seed: int = 0) -> None:
        super().__init__(target_length, seed)

    def _positions(self, length: int, draw: np.random.Generator) -> np.ndarray:
        return np.sort(draw.choice(self.target_length, size=length, replace=False, shuffle=False))


def _require(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PatchError(f"{name}={value!r}; expected a whole number of {least} or more")
