"""Where a token stands: padding, packed documents, skipped ids and explicit ids, for every scheme on every family."""

import pytest
import torch

import hfpos
from tests.pairs import (
    ORIGINAL,
    OWN_ATTENTION,
    PAIRS,
    ROTARY,
    WAYS,
    Pair,
    checkpointing,
    difference,
    tokens,
    unpatched,
)


LENGTHS = 40, 27  # of the rows of a padded batch: one crosses the original length, one does not
DOCUMENTS = 21, 40  # of the parts of a packed row


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of two rows of `LENGTHS` and its attention mask."""
    ids, mask = torch.zeros(2, LENGTHS[0], dtype=torch.long), torch.zeros(2, LENGTHS[0], dtype=torch.long)
    for row, (length, text) in enumerate(zip(LENGTHS, texts(), strict=True)):
        place = slice(-length, None) if side == "left" else slice(length)
        ids[row, place], mask[row, place] = text[0], 1
    return ids, mask


def texts() -> list[torch.Tensor]:
    """The rows of `padded`, alone."""
    return [tokens(1, length, seed) for seed, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@torch.no_grad()
def test_padding_moves_nothing(pair: Pair, side: str) -> None:
    model = pair.model()
    ids, mask = padded(side)
    together = model(ids, attention_mask=mask).logits
    for row, text in enumerate(texts()):
        assert difference(together[row, mask[row].bool()], model(text).logits[0]) < 2e-5


@pytest.mark.parametrize("pair", WAYS, ids=str)
@torch.no_grad()
def test_embeddings_stand_where_their_tokens_stand(pair: Pair) -> None:
    model = pair.model()
    ids, mask = padded("left")
    embeddings = model.get_input_embeddings()(ids)
    logits = model(inputs_embeds=embeddings, attention_mask=mask).logits[mask.bool()]
    assert difference(logits, model(ids, attention_mask=mask).logits[mask.bool()]) < 1e-6


@pytest.mark.parametrize("pair", WAYS, ids=str)
@torch.no_grad()
def test_autocast_rounds_activations_not_positions(pair: Pair) -> None:
    model = pair.model()
    ids, mask = padded("left")
    exact = model(ids, attention_mask=mask).logits[mask.bool()]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids, attention_mask=mask).logits[mask.bool()]
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().mean() < 0.02 * exact.abs().mean()


def packed(pair: Pair) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Two documents, both in one row, and its position ids. A scheme that pins the prompt is asked no more than it can: one set."""
    lengths = (21, ORIGINAL) if pair.pins_prompt else DOCUMENTS
    documents = [tokens(1, length, seed) for seed, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return documents, torch.cat(documents, dim=1), positions


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_packed_documents_do_not_see_each_other(pair: Pair) -> None:
    model = pair.model()
    documents, row, positions = packed(pair)
    with torch.no_grad():
        apart = torch.cat([model(document).logits for document in documents], dim=1)
        assert difference(model(row, position_ids=positions).logits, apart) < 2e-5
        assert difference(model(row, position_ids=positions, use_cache=False).logits, apart) < 2e-5
        assert difference(model(row.repeat(2, 1), position_ids=positions).logits[1:], apart) < 2e-5
    assert difference(checkpointing(model)(row, position_ids=positions).logits, apart) < 2e-5


def skipping(row_length: int = 28, skip: int = 25) -> torch.Tensor:
    """Position ids (1, row_length) of two chunks with a gap between them."""
    ids = torch.arange(row_length)
    return torch.where(ids < row_length // 2, ids, ids + skip)[None]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_chunk_behind_skipped_ids_sees_the_chunk_before_them(pair: Pair) -> None:
    model = pair.model()
    ids, positions = tokens(1, 28), skipping()
    ones = torch.ones_like(ids)
    other = ids.clone()
    other[0, 13] = ids[0, 13] % 100 + 3
    with torch.no_grad():
        if pair.pins_prompt:
            expected = model(ids, position_ids=positions, attention_mask=ones).logits
        else:  # one token at a time: nothing there could be taken for a packed row
            cache, steps = None, []
            for i in range(28):
                now = slice(i, i + 1)
                output = model(ids[:, now], position_ids=positions[:, now], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                steps.append(output.logits)
            expected = torch.cat(steps, dim=1)
        assert pair.scheme == "nope" or difference(expected, model(ids).logits) > 1e-3  # the gap is felt
    for options in ({}, {"use_cache": False}, {"attention_mask": ones}, "checkpointing"):
        if options == "checkpointing":
            checkpointing(model)
            options = {}
        logits = model(ids, position_ids=positions, **options).logits
        assert difference(logits, expected) < 2e-5
        moved = model(other, position_ids=positions, **options).logits
        assert difference(moved[:, :13], logits[:, :13]) < 1e-6
        assert pair.hides or difference(moved[:, 14], logits[:, 14]) > 1e-2


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@torch.no_grad()
def test_explicit_ids_win_over_the_mask(pair: Pair) -> None:
    model = pair.model()
    ids, positions = tokens(1, 20), skipping(20) + 2
    alone = model(ids, position_ids=positions).logits
    pad = torch.zeros(1, 6, dtype=torch.long)
    mask = torch.cat((pad, torch.ones_like(ids)), dim=1)
    logits = model(torch.cat((pad, ids), 1), position_ids=torch.cat((pad, positions), 1), attention_mask=mask).logits
    assert difference(logits[:, 6:], alone) < 2e-5
    assert pair.scheme == "nope" or difference(alone, model(ids).logits) > 1e-3


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.relative], ids=str)
@torch.no_grad()
def test_relative_schemes_feel_only_distances(pair: Pair) -> None:
    model = pair.model()
    ids = tokens(2, 20)
    for shift in (1, ORIGINAL - 20):  # no further: beyond the original length some schemes change by design
        shifted = model(ids, position_ids=torch.arange(20)[None] + shift).logits
        assert difference(shifted, model(ids).logits) < 2e-5


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if not pair.relative], ids=str)
@torch.no_grad()
def test_absolute_schemes_feel_a_shift(pair: Pair) -> None:
    model = pair.model()
    ids = tokens(1, 20)
    assert difference(model(ids, position_ids=torch.arange(20)[None] + 7).logits, model(ids).logits) > 1e-2


@pytest.mark.parametrize("model_type", [*ROTARY, "gpt2", *OWN_ATTENTION])
@torch.no_grad()
def test_without_positions_only_the_mask_tells_order(model_type: str) -> None:
    model = unpatched(model_type)
    ids, order = tokens(1, 20), torch.randperm(20, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    if model_type not in OWN_ATTENTION:  # which takes no such mask until it is patched
        before = model(ids, attention_mask=everything).logits
        assert difference(model(ids[:, order], attention_mask=everything).logits, before[:, order]) > 1e-2
    hfpos.patch(model, "nope")
    logits = model(ids, attention_mask=everything).logits
    assert difference(model(ids[:, order], attention_mask=everything).logits, logits[:, order]) < 2e-5
    assert difference(model(ids[:, order]).logits, model(ids).logits[:, order]) > 1e-2


def loss_and_gradients(model: torch.nn.Module, calls: list[dict]) -> tuple[float, list[torch.Tensor]]:
    """The sum of the losses of some forwards, all made before the one backward, and every parameter's gradient."""
    loss = sum(model(**call, use_cache=False).loss for call in calls)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_gradient_checkpointing_changes_nothing(pair: Pair) -> None:
    calls = []
    for side in ("left", "right"):  # the second forward must not lend its positions to the backward of the first
        ids, mask = padded(side)
        calls.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    loss, gradients = loss_and_gradients(pair.model().train(), calls)
    checkpointed_loss, checkpointed = loss_and_gradients(checkpointing(pair.model()), calls)
    assert checkpointed_loss == pytest.approx(loss, abs=1e-5)
    assert len(checkpointed) == len(gradients)
    for a, b in zip(checkpointed, gradients, strict=True):
        assert difference(a, b) < 1e-5 * max(b.abs().max().item(), 1)


@pytest.mark.parametrize("pair", WAYS, ids=str)
def test_a_failed_call_leaves_no_positions_behind(pair: Pair) -> None:
    model = pair.model()
    ids = tokens(1, 20)
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            model(ids, position_ids=skipping(20), labels=tokens(1, 7))
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            model(ids + 10_000, position_ids=skipping(20))
        assert torch.equal(model(ids).logits, before)
        assert torch.equal(model.base_model(ids)[0], pair.model().base_model(ids)[0])


@pytest.mark.parametrize("model_type", [*ROTARY, "gpt2", *OWN_ATTENTION])
def test_position_ids_of_several_axes_are_refused(model_type: str) -> None:
    model = hfpos.patch(unpatched(model_type), "nope")
    with pytest.raises(hfpos.PatchError, match=r"position_ids have shape \(3, 1, 20\)"):
        model(tokens(1, 20), position_ids=torch.arange(20).expand(3, 1, 20))


def test_a_call_without_tokens_is_refused() -> None:
    with pytest.raises(hfpos.PatchError, match="without input_ids"):
        hfpos.patch(unpatched("llama"), "alibi").model(attention_mask=torch.ones(1, 4))
