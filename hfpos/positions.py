"""Where every token stands: one forward pre-hook on the decoder works positions out and hands them on.

Positions come from `position_ids`, else from a 2-D `attention_mask` (so padding never shifts them), else they are counted;
never from the index in a local shard. The hook gives

- the model the position ids that its *mask* code should see: transformers reads a jump in them as the start of a new packed
  document, so skipped ids (PoSE) are closed up first and only true restarts remain;
- the rotary embedding (or position table) the *true* ids, through `TruePositions`;
- attention a `Call`, as a keyword argument. An argument, not state, so that gradient checkpointing recomputes each layer with
  the positions of its own forward;
- the cache a record of the positions of the keys it holds, which survives cropping (assisted generation), beam search,
  sliding windows and static caches.

Shapes: B batch (1 where all rows are alike), Q query tokens of this call, K keys seen so far.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hfpos.attention.sequence_parallel import Part, require_positions, sharing, take_part
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

# The attribute of a cache under which the positions (and the pinned prompt lengths) of its keys are kept.
CACHE_RECORD = "hfpos_record"


class Memo:
    """What one layer has worked out for the others of the same forward. Not a dict itself: accelerate and torch copy those on their way."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}


class Call(NamedTuple):
    """What one forward call tells its attention layers; travels as the keyword argument `hfpos`.

    A tuple, so that accelerate's device hooks move the tensors in it along.

    Attributes:
        seam: what acts on queries, keys and logits (see `hfpos.attention.interface`); None where nothing does.
        q_positions: (B, Q) int64.
        k_positions: (B, K) int64, the keys in the cache and those of this call.
        total: how many keys have been seen, those of this call included; a tensor under a static cache.
        lengths: (B, 1) int64, the prompt lengths that a pinned scheme goes by; None elsewhere.
        rotation: cos and sin, each (B, 1, Q, R/2) float32, where attention rotates before it caches; None elsewhere.
        weights: the seam's learned weights, of all layers; None where nothing is learned.
        part: this process's part of a sequence that several share; None where it has all of it.
        memo: what one layer has worked out for the others.
    """

    seam: Any
    q_positions: torch.Tensor
    k_positions: torch.Tensor
    total: int | torch.Tensor
    lengths: torch.Tensor | None = None
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    weights: dict[str, torch.Tensor] | None = None
    part: Part | None = None
    memo: Memo | None = None

    def keys_of_layer(self, length: int) -> torch.Tensor:
        """Positions (B, length) of the keys one layer sees: a sliding layer sees the last ones, a static one has room left over."""
        known = self.k_positions.shape[-1]
        if length == known:
            return self.k_positions
        if not isinstance(self.total, torch.Tensor):
            if length < known:
                return self.k_positions[:, known - length :]
            return torch.nn.functional.pad(self.k_positions, (0, length - known))
        start = (self.total - length).clamp(min=0)
        index = (start + torch.arange(length, device=self.k_positions.device)).clamp(max=known - 1)
        return self.k_positions[:, index]


class CacheRecord(NamedTuple):
    """What is remembered with a cache: the positions of its keys and, for pinned schemes, each row's prompt length."""

    k_positions: torch.Tensor
    lengths: torch.Tensor | None


class TruePositions:
    """Forward pre-hook of a rotary embedding or position table: puts the true ids in the place of the closed-up ones."""

    def __init__(self, source: PositionHook, argument: int) -> None:
        self.source = source
        self.argument = argument

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Replace `position_ids` where the hook of this call has closed gaps up."""
        true = self.source.true_ids
        if true is None:
            return None
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": true.to(kwargs["position_ids"].device)}
        given = args[self.argument]
        return (*args[: self.argument], true.to(given.device), *args[self.argument + 1 :]), kwargs


class OuterPositionIds:
    """Forward pre-hook of a language model whose head does not hand `position_ids` on to its decoder (BLOOM)."""

    def __init__(self, target: PositionHook) -> None:
        self.target = target

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Keep the caller's ids for the decoder's own hook."""
        self.target.outer_ids = kwargs.pop("position_ids", None)
        return args, kwargs


class MaskedPositionIds:
    """Forward pre-hook of a composite model, which would count positions itself, padding included, before its decoder is asked."""

    def __init__(self, model: nn.Module) -> None:
        self.arguments = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Put in the position ids that follow from a 2-D attention mask, unless the caller gave some."""
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        mask, tokens = kwargs.get("attention_mask"), kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        wanted = "position_ids" in self.arguments and kwargs.get("position_ids") is None
        if wanted and tokens is not None and isinstance(mask, torch.Tensor) and mask.ndim == 2:
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()
            kwargs["position_ids"] = masked_positions(mask, past, tokens.shape[1])
        return (), kwargs


def masked_positions(mask: torch.Tensor, past: int | torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions (B, tokens) of the tokens after the first `past` under a mask (B, >= past + tokens) that is 0 where there is padding."""
    if isinstance(past, int) and mask.shape[-1] < past + tokens:
        raise PatchError(
            f"the attention_mask covers {mask.shape[-1]} tokens; expected one entry for each of the {past} tokens in the cache and the "
            f"{tokens} of this call"
        )
    index = torch.arange(tokens, device=mask.device) + past
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, index]


class PositionHook:
    """The forward pre-hook and forward hook of a patched decoder; see the module's text.

    Args:
        decoder: the module whose forward takes `input_ids`, `position_ids`, `attention_mask` and the cache.
        seam: handed to attention in each `Call`; None where attention is the model's own.
        table: `(positions, width) -> rows` added to the token embeddings, or the name of the decoder's module that gives rows of
            positions, looked up in each call, as PEFT may have wrapped it; None where nothing is added.
        rotation: `positions -> (cos, sin)` for attention that rotates before it caches; None elsewhere.
        pins_prompt: keep each row's prompt length with the cache.
        passes_call: whether the decoder's layers take the `Call` as a keyword argument; else they fetch it from `self.call`, which
            is then always made.
        masks_packing: build the mask of packed documents here, for a decoder whose own mask code does not look at position ids.
        bidirectional: its tokens attend to those behind them.
        first: what the model's own position ids begin at; ours begin at 0.
        padding: a token id that takes no place, for a model that sees its padding in the ids; None where only a mask tells.
    """

    def __init__(
        self,
        decoder: nn.Module,
        *,
        seam: Any = None,
        table: Callable[[torch.Tensor, int], torch.Tensor] | str | None = None,
        rotation: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        pins_prompt: bool = False,
        passes_call: bool = True,
        masks_packing: bool = False,
        bidirectional: bool = False,
        first: int = 0,
        padding: int | None = None,
    ) -> None:
        self.arguments = [name for name in inspect.signature(type(decoder).forward).parameters if name != "self"]
        self.takes_position_ids = "position_ids" in self.arguments
        self.seam = seam
        self.table = table
        self.rotation = rotation
        self.pins_prompt = pins_prompt
        self.passes_call = passes_call
        self.masks_packing = masks_packing
        self.bidirectional = bidirectional
        self.first = first
        self.padding = padding
        self.outer_ids: torch.Tensor | None = None
        self.true_ids: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.call: Call | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The forward pre-hook."""
        kwargs = dict(zip(self.arguments, args, strict=False)) | kwargs
        shape, device = self._shape(module, kwargs)
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        mask = kwargs.get("attention_mask")
        if self.seam is not None and isinstance(mask, torch.Tensor) and mask.ndim == 4:
            self.seam.check_given(mask)
        mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

        given = kwargs.get("position_ids")
        if given is None:
            given, self.outer_ids = self.outer_ids, None
        shared = sharing(module)
        if shared is not None and self.bidirectional:
            raise PatchError(
                f"{type(module).__name__} attends both ways, and its sequence is shared by several processes, which hfpos knows for causal models "
                "only; give each process whole sequences"
            )
        require_positions(shared, given, past)
        if given is not None:
            positions = given.to(device)
            if positions.ndim != 2:
                raise PatchError(
                    f"position_ids have shape {tuple(positions.shape)}; a patched model expects (batch, tokens), one position a token"
                )
            if self.first:
                positions = (positions - self.first).clamp(min=0)
        elif mask is not None:
            positions = masked_positions(mask.to(device), past, shape[1])
        elif self.padding is not None and kwargs.get("input_ids") is not None:
            positions = masked_positions(kwargs["input_ids"] != self.padding, 0, shape[1]) + past
        else:
            if self.table is not None or (self.seam is not None and self.seam.absolute):
                _refuse_hidden(kwargs.get("attention_mask"), past)
            positions = (torch.arange(shape[1], device=device) + past)[None]

        self.true_ids, self.positions = None, positions
        if given is not None and kwargs.get("attention_mask") is None and cache is None:
            self._close_gaps(module, positions, shape, kwargs)
        elif self.takes_position_ids and (given is not None or mask is not None):
            kwargs["position_ids"] = positions + self.first if self.first else positions
        if self.table is not None:
            self._add_table(self.table, module, positions, kwargs)
        if self.seam is not None or self.rotation is not None or not self.passes_call:
            self.call = self._call(module, positions, mask, cache, past, shape[0], shared)
            if self.passes_call:
                kwargs["hfpos"] = self.call
        return (), kwargs

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """The forward hook: leaves the positions of the keys with the cache."""
        call, self.call, self.true_ids, self.positions = self.call, None, None, None
        if call is None or call.seam is None:
            return
        cache = output.get("past_key_values") if hasattr(output, "get") else kwargs.get("past_key_values")
        if cache is None and isinstance(output, tuple):
            cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
        if cache is not None:
            setattr(cache, CACHE_RECORD, CacheRecord(call.k_positions, call.lengths))

    def _shape(self, module: nn.Module, kwargs: dict) -> tuple[tuple[int, int], torch.device]:
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = ids if ids is not None else embeds
        if tokens is None:
            raise PatchError(
                f"{type(module).__name__} was called without input_ids and without inputs_embeds; give one of them"
            )
        return (tokens.shape[0], tokens.shape[1]), tokens.device

    def _close_gaps(self, module: Any, positions: torch.Tensor, shape: tuple[int, int], kwargs: dict) -> None:
        """Keep the true ids aside and give the mask code ids that jump only where a document begins (where ids do not rise)."""
        begins = torch.nn.functional.pad(positions[:, 1:] <= positions[:, :-1], (1, 0))
        index = torch.arange(shape[1], device=positions.device)
        # The first run goes on from where it begins: where processes share a sequence, a zero would tell a kernel that a document begins.
        start = torch.where(begins.cumsum(-1) > 0, 0, positions[:, :1])
        closed = index - torch.where(begins, index, 0).cummax(-1).values + start
        self.true_ids = positions
        if self.takes_position_ids:
            kwargs["position_ids"] = closed + self.first if self.first else closed
        if self.bidirectional:
            self._mask_documents(module, begins, shape, kwargs)
            return
        if kwargs.get("use_cache") is None and (torch.compiler.is_compiling() or bool(begins.any())):
            kwargs["use_cache"] = False  # transformers keeps packed documents apart only in a call without a cache
        if self.masks_packing:
            from transformers.masking_utils import create_causal_mask

            like = torch.empty((*shape, 0), device=positions.device, dtype=next(module.parameters()).dtype)
            kwargs["attention_mask"] = create_causal_mask(
                module.config, inputs_embeds=like, attention_mask=None, past_key_values=None, position_ids=closed
            )

    def _mask_documents(
        self, module: Any, begins: torch.Tensor, shape: tuple[int, int], kwargs: dict[str, Any]
    ) -> None:
        """Where documents are packed into a row, the mask that keeps them apart, both ways."""
        if not self.masks_packing or not (torch.compiler.is_compiling() or bool(begins.any())):
            return
        from transformers.masking_utils import create_bidirectional_mask, packed_sequence_mask_function

        document = begins.cumsum(-1).expand(shape[0], -1)
        like = torch.empty((*shape, 0), device=begins.device, dtype=next(module.parameters()).dtype)
        apart = packed_sequence_mask_function(document)
        kwargs["attention_mask"] = create_bidirectional_mask(module.config, like, None, and_mask_function=apart)

    @staticmethod
    def _add_table(table: Callable | str, module: Any, positions: torch.Tensor, kwargs: dict) -> None:
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = module.get_input_embeddings()(ids)
        if ids is not None and getattr(module, "hidden_size_per_layer_input", None):
            # Gemma 3n and 4 look ids up for each layer too, and get none below
            kwargs["per_layer_inputs"] = module.get_per_layer_inputs(ids)
        places = positions.to(embeds.device)
        rows = getattr(module, table)(places) if isinstance(table, str) else table(places, embeds.shape[-1])
        kwargs["input_ids"], kwargs["inputs_embeds"] = None, embeds + rows.to(embeds.device, embeds.dtype)

    def _call(
        self, module: Any, positions: torch.Tensor, mask: Any, cache: Any, past: Any, batch: int, shared: Any
    ) -> Call:
        rotation = None
        if self.rotation is not None:
            cos, sin = self.rotation(positions)
            rotation = cos[:, None], sin[:, None]
        if self.seam is None:  # attention needs no positions of earlier keys
            return Call(None, positions, positions, past + positions.shape[-1], rotation=rotation)
        self.seam.check_backend(module)
        part = None
        if shared is not None:
            positions, part = take_part(shared, module.config, positions, mask)
        record: CacheRecord | None = getattr(cache, CACHE_RECORD, None)
        k_positions, total = self._keys(positions, mask, cache, past, record, batch)
        lengths = self._prompt_lengths(positions, past, record, batch) if self.pins_prompt else None
        weights = self.seam.gather(module)
        return Call(self.seam, positions, k_positions, total, lengths, rotation, weights, part, Memo())

    @staticmethod
    def _prompt_lengths(positions: torch.Tensor, past: Any, record: CacheRecord | None, batch: int) -> torch.Tensor:
        """The length (B, 1) of each row's prompt, which is what an empty cache is filled with first."""
        lengths = positions.amax(-1, keepdim=True) + 1
        if record is None or record.lengths is None or (isinstance(past, int) and past == 0):
            return lengths
        known = _rows(record.lengths, batch).to(positions.device)
        return torch.where(past == 0, lengths, known) if isinstance(past, torch.Tensor) else known

    def _keys(
        self, positions: torch.Tensor, mask: Any, cache: Any, past: Any, record: CacheRecord | None, batch: int
    ) -> tuple[torch.Tensor, int | torch.Tensor]:
        """Positions (B, K) of all keys, those the cache was filled with and those of this call, and how many they are."""
        tokens = positions.shape[-1]
        # A static cache has room for keys to come. One whose first layer slides counts in Python, though, and needs no room here.
        if not getattr(cache, "is_compileable", False) or cache.is_sliding[0]:
            if cache is None or (isinstance(past, int) and past == 0):
                return positions, tokens
            before = self._known(record, mask, past, batch, positions.device)[:, :past]
            rows = max(before.shape[0], positions.shape[0])
            return torch.cat((before.expand(rows, -1), positions.expand(rows, -1)), dim=-1), past + tokens
        before = self._known(record, mask, cache.get_max_length(), batch, positions.device)
        rows = max(before.shape[0], positions.shape[0])
        index = torch.arange(tokens, device=positions.device) + past
        return before.expand(rows, -1).index_copy(1, index, positions.expand(rows, -1)), index[-1] + 1

    @staticmethod
    def _known(record: CacheRecord | None, mask: Any, length: int, batch: int, device: torch.device) -> torch.Tensor:
        """Positions (B, >= length) of the cached keys. A cache that was filled elsewhere is taken to hold consecutive tokens."""
        if record is not None and record.k_positions.shape[-1] >= length:
            return _rows(record.k_positions, batch).to(device)
        if mask is not None and mask.shape[-1] >= length:
            return (mask.to(device).long().cumsum(-1) - 1).clamp(min=0)
        return torch.arange(length, device=device)[None]


def _refuse_hidden(mask: Any, past: int | torch.Tensor) -> None:
    """Raise `PatchError` where a 4-D mask hides earlier tokens, so that counting would not tell where the others stand."""
    if (
        not isinstance(mask, torch.Tensor)
        or mask.ndim != 4
        or torch.compiler.is_compiling()
        or not isinstance(past, int)
    ):
        return
    visible = mask if mask.dtype == torch.bool else mask == 0
    if not bool(visible.tril(past).eq(torch.ones_like(visible).tril(past)).all()):
        raise PatchError(
            "the 4-D attention_mask hides earlier tokens (padding, or documents packed into a row) and no position_ids came with it, so "
            "where the others stand cannot be told; pass position_ids, or a 2-D attention_mask"
        )


def _rows(recorded: torch.Tensor, batch: int) -> torch.Tensor:
    """The record's rows for a batch that may have been widened since, as beam search and `num_return_sequences` do."""
    rows = recorded.shape[0]
    if rows in (1, batch):
        return recorded
    if batch % rows:
        raise PatchError(
            f"the cache was filled with a batch of {rows} rows and is now used with {batch}; expected the same rows, or each of them "
            "repeated equally often"
        )
    return recorded.repeat_interleave(batch // rows, dim=0)
