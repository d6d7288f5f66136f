"""What must hold of any language model, patched or not: one function a property, each returning a complaint or None.

They see a model only from outside, through `input_ids` and `attention_mask`, as a user does. An encoder-decoder reads the same tokens
in both stacks.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.functional import cross_entropy


if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Float32 rounding through a few layers stays two orders of magnitude below this share of the largest logit, a wrong position above.
TOLERANCE = 1e-3
MOVED = 1e-5  # of the largest logit: well above float32 noise, well below the smallest change a scheme makes to a tiny model
STEPS = 8
PADDING = 6


def reads_a_source(model: PreTrainedModel) -> bool:
    """Whether the model is an encoder-decoder."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def logits(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Float32 logits (B, Q, V) of token ids (B, Q), without a graph."""
    with torch.no_grad():
        return _run(model, ids, **arguments).logits.float()


def _run(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> Any:
    target = {"decoder_input_ids": ids} if reads_a_source(model) else {}
    return model(input_ids=ids, **(target | arguments))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest deviation, as a share of the largest expected value; infinite where either is not finite.

    >>> difference(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    0.25
    """
    if not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def _complaint(found: torch.Tensor, expected: torch.Tensor) -> str | None:
    share = difference(found, expected)
    return None if share <= TOLERANCE else f"off by {share:.1e} of the largest logit"


def finite(model: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """Logits are finite."""
    return None if logits(model, ids).isfinite().all() else "logits are not finite"


def repeatable(model: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """The same call twice gives bit-equal logits."""
    return None if torch.equal(logits(model, ids), logits(model, ids)) else "two equal calls differ"


def decoding(model: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """The last tokens fed one by one, with a cache, give the logits of a full forward."""
    first = ids.shape[1] - STEPS
    found = []
    with torch.no_grad():
        words, given = "input_ids", {}
        if reads_a_source(model):
            words, given = "decoder_input_ids", {"encoder_outputs": model.get_encoder()(input_ids=ids)}
        output = model(**{words: ids[:, :first]}, **given, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return "returns no cache"
        for index in range(first, ids.shape[1]):
            output = model(**{words: ids[:, index : index + 1]}, **given, past_key_values=cache, use_cache=True)
            found.append(output.logits.float())
    return _complaint(torch.cat(found, dim=1), logits(model, ids)[:, first:])


def left_padding(model: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """Padding on the left, told by `attention_mask` only, leaves a row's last logits as they are without it."""
    padded, mask = ids.repeat(2, 1), torch.ones(2, ids.shape[1], dtype=torch.long)
    padded[1, :PADDING], mask[1, :PADDING] = 0, 0
    both, one = ({"decoder_input_ids": each} if reads_a_source(model) else {} for each in (ids.repeat(2, 1), ids))
    found = logits(model, padded, attention_mask=mask, **both)[:, -1]
    alone = torch.cat((logits(model, ids)[:, -1], logits(model, ids[:, PADDING:], **one)[:, -1]))
    return _complaint(found, alone)


def right_padding(model: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """Padding on the right, told by `attention_mask`, leaves all logits as they are without it, also of a model that sees all tokens."""
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[:, -PADDING:], mask[:, -PADDING:] = 0, 0
    short = ids[:, :-PADDING]
    target = {"decoder_input_ids": short} if reads_a_source(model) else {}
    found = logits(model, padded, attention_mask=mask, **target)[:, : short.shape[1]]
    return _complaint(found, logits(model, short))


def generation(model: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """`generate` from a left-padded prompt gives at each step the logits of a full forward over the tokens so far."""
    prompt = ids[:, :-STEPS]
    padded, mask = prompt.repeat(2, 1), torch.ones(2, prompt.shape[1], dtype=torch.long)
    padded[1, :PADDING], mask[1, :PADDING] = 0, 0
    output = cast("Any", model).generate(
        padded,
        attention_mask=mask,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = torch.stack(output.logits, dim=1).float()
    for row, start in enumerate((0, PADDING)):
        alone = logits(model, output.sequences[row : row + 1, start:-1])[:, -STEPS:]
        if complaint := _complaint(found[row : row + 1], alone):
            return complaint
    return None


def gradients(model: PreTrainedModel, ids: torch.Tensor) -> str | None:
    """A backward pass gives finite gradients, and not only zeros."""
    model.zero_grad()
    output = _run(model, ids).logits
    cross_entropy(output[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    given = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    if not all(gradient.isfinite().all() for gradient in given):
        return "gradients are not finite"
    return None if any(gradient.any() for gradient in given) else "every gradient is zero"
