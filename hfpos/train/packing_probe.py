"""Whether a model keeps the documents that are packed into one row apart."""

from __future__ import annotations

from typing import Any

import torch

from hfpos.patching import afresh, causal_model
from hfpos.probe import can_run, eval_mode
from hfpos.scheme import PatchError


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Raise `PatchError` unless a document gives the same logits behind another one in its row as alone.

    Transformers tells documents apart by position ids that restart; a model that does not take them, or whose attention does not look at
    the mask that follows from them, would read on from one document into the next without a word.
    """
    if not can_run(model):
        return
    name = type(causal_model(model)).__name__
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(12, device=device)[None] * 5 % model.get_input_embeddings().weight.shape[0]
    positions = torch.cat([torch.arange(7), torch.arange(5)]).to(device)[None]
    with eval_mode(model), afresh(model):
        try:
            packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 7:].float()
            alone = model(input_ids=ids[:, 7:], use_cache=False).logits.float()
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, PatchError) as error:
            raise PatchError(
                f"data.packing=documents gives position_ids that restart with each document, and {name} does not run with them "
                f"({' '.join(str(error).split())}); set data.packing to blocks or joined"
            ) from error
    tolerance = 0.05 if model.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if (packed - alone).abs().max() > tolerance * alone.abs().max():
        raise PatchError(
            f"{name} does not keep documents apart that are packed into one row by position_ids; set data.packing to blocks or joined"
        )
