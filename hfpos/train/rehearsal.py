"""A training step and an evaluation, gone through with hollow tensors to find how many bytes are alive at most."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from hfpos.evaluate.scoring import MASK_ENTRIES, WHOLE, rows_at_once
from hfpos.patching import causal_model
from hfpos.scheme import PatchError
from hfpos.train.head import chunk_the_loss
from hfpos.train.holdings import Held
from hfpos.train.hollow import FUSED, hollow, make_hollow, meta_copy
from hfpos.train.live_bytes import LiveBytes


WEIGHTS, GRADIENTS, ACTIVATIONS, LOSS = "weights", "gradients", "activations", "loss"


@dataclass(frozen=True)
class Rehearsal:
    """What is gone through.

    Attributes:
        model: on meta or not; it is not changed.
        held: what this process has of each parameter.
        mixed: the 16-bit dtype of mixed precision, None without.
        autocast: whether the forward itself casts; engines with shards have cast the weights.
        device: "cuda" or "cpu", whose kernels are played.
    """

    model: nn.Module
    held: dict[nn.Parameter, Held]
    mixed: torch.dtype | None
    autocast: bool
    device: str

    def training(
        self,
        batch_size: int,
        tokens: int,
        *,
        checkpointing: bool,
        chunked_loss: bool,
        accumulates: bool,
        packed: bool,
    ) -> Counter[str]:
        """Bytes by kind where forward, loss and backward of one micro-batch hold most.

        Args:
            tokens: of each row, on this process.
            checkpointing: layers are recomputed in the backward.
            chunked_loss: no logits of the whole row, where the model's loss allows it.
            accumulates: gradients of earlier micro-batches are there.
            packed: positions begin again within a row.
        """
        with self._twin(tokens, chunked_loss) as (model, held, live):
            _keep_gradients(held, live, accumulates)
            model.train()
            _checkpoint(model, checkpointing)
            # accelerate's wrapping
            run = model if self.mixed is None else convert_outputs_to_fp32(model.__call__)
            with live:
                ids = torch.zeros(batch_size, tokens, dtype=torch.long)
                positions = torch.arange(tokens) % -(-tokens // 2)
                told = {"position_ids": positions.expand_as(ids)} if packed and not self._fused() else {}
                with self._cast(), _marks_loss(model, live):
                    loss = run(input_ids=ids, labels=ids, use_cache=False, **told).loss
                loss.backward()
            return live.peak

    def evaluation(self, tokens: int) -> tuple[Counter[str], int]:
        """Bytes by kind where scoring one row holds most, and the bytes of its cache of keys and values.

        As `hfpos.evaluate` does it: a long row goes in pieces through the cache, so what counts is the last piece.
        """
        with self._twin(tokens, chunked_loss=False) as (model, _, live):
            model.eval()
            ids = torch.zeros(1, tokens, dtype=torch.long)
            piece = tokens if tokens <= WHOLE else max(256, MASK_ENTRIES // tokens)
            last = "logits_to_keep" in inspect.signature(type(causal_model(model)).forward).parameters
            few = {"logits_to_keep": 1} if last else {}
            with torch.no_grad(), self._cast(), live:
                cache = None
                if piece < tokens:
                    cache = model(input_ids=ids[:, :-piece], use_cache=True, **few).get("past_key_values")
                    live.forget_peak()
                output = model(
                    input_ids=ids if cache is None else ids[:, -piece:], past_key_values=cache, use_cache=True, **few
                )
                cache = output.get("past_key_values")
                del output, ids
                return live.peak, 0 if cache is None else live.live[ACTIVATIONS]

    def _fused(self) -> bool:
        """Whether attention needs no mask for packed documents."""
        return causal_model(self.model).config._attn_implementation in FUSED

    def _cast(self) -> torch.autocast:
        return torch.autocast("cpu", self.mixed, enabled=self.mixed is not None and self.autocast)

    @contextlib.contextmanager
    def _twin(self, tokens: int, chunked_loss: bool) -> Iterator[tuple[Any, dict[nn.Parameter, Held], LiveBytes]]:
        """A hollow model, what is held of its parameters, and the counter that has them."""
        memo: dict[int, Any] = {}
        twin = meta_copy(self.model, memo)
        if chunked_loss:
            head = causal_model(twin).get_output_embeddings()
            vocabulary = getattr(head, "out_features", causal_model(twin).config.get_text_config().vocab_size)
            chunk_the_loss(twin, chunk=rows_at_once(vocabulary, torch.device(self.device)))
        held = {memo[id(parameter)]: each for parameter, each in self.held.items()}
        live = LiveBytes(ACTIVATIONS)
        try:
            with hollow(tokens, self.device), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                new = make_hollow(twin, {parameter: each.dtype for parameter, each in held.items()})
                for parameter, each in held.items():
                    live.hold(new[parameter], WEIGHTS, each.weight)
                for buffer in twin.buffers():
                    live.hold(buffer, WEIGHTS)
                yield twin, {new[parameter]: each for parameter, each in held.items()}, live
        except PatchError:
            raise
        except Exception as error:
            raise PatchError(
                f"the memory of {type(causal_model(self.model)).__name__} at {tokens} tokens cannot be estimated: its step fails on tensors "
                f"without content ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from error


def _keep_gradients(held: dict[nn.Parameter, Held], live: LiveBytes, accumulates: bool) -> None:
    """Count gradients, once they are whole, as what this process keeps of them."""
    for parameter, each in held.items():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda done, size=each.gradient: live.hold(done.grad, GRADIENTS, size)
            )
            if accumulates:
                parameter.grad = torch.zeros_like(parameter)
                live.hold(parameter.grad, GRADIENTS, each.gradient)


def _checkpoint(model: Any, checkpointing: bool) -> None:
    # newer Transformers call it activation_..., and warn about the other name
    now, before = (
        f"{kind}_checkpointing_{'enable' if checkpointing else 'disable'}" for kind in ("activation", "gradient")
    )
    getattr(model, now if hasattr(model, now) else before)()


@contextlib.contextmanager
def _marks_loss(model: nn.Module, live: LiveBytes) -> Iterator[None]:
    """Count what is made after the decoder's forward, and before its backward, as the loss's."""

    def leaves(_: Any, args: Any, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is not None:
            live.kind = LOSS
            if hidden.requires_grad:
                hidden.register_hook(lambda _: setattr(live, "kind", ACTIVATIONS))

    language: Any = causal_model(model)
    handle = language.get_decoder().register_forward_hook(leaves)
    try:
        yield
    finally:
        handle.remove()
