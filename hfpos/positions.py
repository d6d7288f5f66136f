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
from typing import TYPE_CHECKING, Any

import torch

from hfpos.attention.sequence_parallel import require_positions, sharing, take_part
from hfpos.cached_positions import CACHE_RECORD, CacheRecord, key_positions, prompt_lengths
from hfpos.call import Call, Memo
from hfpos.position_ids import masked_positions, refuse_hidden
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


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
        positions = self._work_out(given, mask, past, shape[1], device, kwargs)
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

    def _work_out(
        self, given: Any, mask: Any, past: Any, tokens: int, device: torch.device, kwargs: dict
    ) -> torch.Tensor:
        """Positions (B, tokens) of the tokens of this call, from the ids that were given, a mask, the padding, or by counting."""
        if given is not None:
            positions = given.to(device)
            if positions.ndim != 2:
                raise PatchError(
                    f"position_ids have shape {tuple(positions.shape)}; a patched model expects (batch, tokens), one position a token"
                )
            return (positions - self.first).clamp(min=0) if self.first else positions
        if mask is not None:
            return masked_positions(mask.to(device), past, tokens)
        if self.padding is not None and kwargs.get("input_ids") is not None:
            return masked_positions(kwargs["input_ids"] != self.padding, 0, tokens) + past
        if self.table is not None or (self.seam is not None and self.seam.absolute):
            refuse_hidden(kwargs.get("attention_mask"), past)
        return (torch.arange(tokens, device=device) + past)[None]

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
            from transformers.masking_utils import create_masks_for_generate  # one for each type of layer

            like = torch.empty((*shape, 0), device=positions.device, dtype=next(module.parameters()).dtype)
            kwargs["attention_mask"] = create_masks_for_generate(
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
        k_positions, total = key_positions(positions, mask, cache, past, record, batch)
        lengths = prompt_lengths(positions, past, record, batch) if self.pins_prompt else None
        weights = self.seam.gather(module)
        return Call(self.seam, positions, k_positions, total, lengths, rotation, weights, part, Memo())
