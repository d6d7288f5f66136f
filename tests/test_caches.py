"""Whatever the cache and however it is filled, the logits are those of one forward over the whole text."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

import hfpos
from hfpos.rotation import cos_sin, inverse_frequencies, rotate
from tests.pairs import ORIGINAL, OWN_ATTENTION, PAIRS, ROTARY, WAYS, Pair, difference, tokens, unpatched


LENGTH = 40  # beyond the original length, and beyond the windows several times
PAD = 5  # left padding of the second row
STEPS = {
    "token by token": [*[1] * PAD, 1, 20, *[1] * (LENGTH - 21 - PAD)],
    "chunks": [
        ORIGINAL - 1,
        1,
        1,
        LENGTH - ORIGINAL - 1,
    ],  # up to one before the original length, up to it, and beyond
    "straddling": [11, 25, LENGTH - 36],
}
CACHES: dict[str, Callable[[PreTrainedModel], Cache | None]] = {
    "default": lambda model: None,
    "plain": lambda model: DynamicCache(),  # which keeps every key, also of layers with a window
    "static": lambda model: StaticCache(model.config, max_cache_len=LENGTH + 7),
}
TO_PROMPT = [pair for pair in PAIRS if pair.pins_prompt]
FOLLOWING = [pair for pair in PAIRS if not pair.pins_prompt]
BY_LENGTH = [pair for pair in PAIRS if pair.scheme in ("dynamic", "dynamic_yarn", "longrope")]


def padded(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows, the second left padded, and their mask."""
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    ids[1, :PAD], mask[1, :PAD] = 0, 0
    return ids, mask


def in_steps(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None, steps: list[int], cache: Cache | None = None
) -> tuple[torch.Tensor, Cache]:
    """The logits of `ids`, given in steps of these lengths behind what `cache` holds, and the cache."""
    logits, start = [], 0
    past = 0 if cache is None else int(cache.get_seq_length())
    for step in steps:
        seen = None if mask is None else mask[:, : past + start + step]
        output = model(ids[:, start : start + step], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
        start += step
    return torch.cat(logits, dim=1), cache


def real(logits: torch.Tensor) -> torch.Tensor:
    """The logits (1, tokens, vocabulary) of the tokens of `padded`, without the padding."""
    return torch.cat((logits[:1], logits[1:, PAD:]), dim=1)


@pytest.mark.parametrize("pair", FOLLOWING, ids=str)
@torch.no_grad()
def test_any_steps_give_the_logits_of_one_forward(pair: Pair) -> None:
    check_steps(pair.model(), CACHES if pair in WAYS else {"default": CACHES["default"]})


@pytest.mark.parametrize("pair", [pair for pair in FOLLOWING if str(pair).startswith("gemma3_text")], ids=str)
@torch.no_grad()
def test_a_layer_with_a_window_may_follow_one_without(pair: Pair) -> None:
    check_steps(pair.model(layer_types=["full_attention", "sliding_attention"]), {"static": CACHES["static"]})


def check_steps(model: PreTrainedModel, caches: dict[str, Callable[[PreTrainedModel], Cache | None]]) -> None:
    """Compare every way to take steps, in each of the caches, with one forward."""
    ids, mask = padded()
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    for kind, make in caches.items():
        for name, steps in STEPS.items():
            logits, _ = in_steps(model, ids, mask, steps, make(model))
            assert difference(real(logits), real(expected)) < 5e-5, (kind, name)
        unmasked, _ = in_steps(model, ids[:1], None, STEPS["straddling"], make(model))
        assert difference(unmasked, expected[:1]) < 5e-5, (kind, "unmasked")


@pytest.mark.parametrize("kind", ["default", "static"])
@pytest.mark.parametrize("pair", TO_PROMPT, ids=str)
@torch.no_grad()
def test_a_pinned_prompt_keeps_the_frequencies_of_its_length(pair: Pair, kind: str) -> None:
    ids, mask = padded()
    for prompt in (ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, LENGTH - 2):
        logits, _ = in_steps(pair.model(), ids, mask, [prompt, *[1] * (LENGTH - prompt)], CACHES[kind](pair.model()))
        for row, start in ((0, 0), (1, PAD)):
            static = pair.unpatched()
            length = max(prompt - start, ORIGINAL)
            if pair.scheme == "longrope":
                divisors = "short_factor" if length == ORIGINAL else "long_factor"
                same = {"short_factor": pair.parameters[divisors], "long_factor": pair.parameters[divisors]}
                hfpos.patch(static, "longrope", **(pair.parameters | same | {"factor": 4.0}))
            else:
                name = {"dynamic": "ntk", "dynamic_yarn": "yarn"}[pair.scheme]
                hfpos.patch(static, name, target_length=length, original_length=pair.parameters.get("original_length"))
            assert difference(logits[row, start:], static(ids[row : row + 1, start:]).logits[0]) < 5e-5


@pytest.mark.parametrize("pair", BY_LENGTH, ids=str)
@torch.no_grad()
def test_neither_rows_nor_calls_influence_each_other(pair: Pair) -> None:
    model = pair.model()
    short, long = tokens(1, 20), tokens(1, 120, seed=1)
    alone = model(short).logits
    model(long)
    assert torch.equal(model(short).logits, alone)
    batch = torch.cat((torch.nn.functional.pad(short, (100, 0)), long))
    mask = torch.ones_like(batch)
    mask[0, :100] = 0
    assert difference(model(batch, attention_mask=mask).logits[:1, 100:], alone) < 2e-5
    _, cache = in_steps(model, short, None, [20])
    _, other = in_steps(model, long, None, [120])
    step = tokens(1, 1, seed=2)
    after, _ = in_steps(model, step, None, [1], other)
    assert difference(after, in_steps(model, torch.cat((long, step), 1), None, [120, 1])[0][:, -1:]) < 2e-5
    after, _ = in_steps(model, step, None, [1], cache)
    assert difference(after, in_steps(model, torch.cat((short, step), 1), None, [20, 1])[0][:, -1:]) < 2e-5


@pytest.mark.parametrize("kind", ["default", "plain"])
@pytest.mark.parametrize("pair", [pair for pair in WAYS if not pair.pins_prompt], ids=str)
@torch.no_grad()
def test_a_cropped_cache_goes_on_from_where_it_was_cut(pair: Pair, kind: str) -> None:
    model = pair.model()
    ids, mask = padded()
    cache = CACHES[kind](model) or DynamicCache(config=model.config)
    cache.activate_past_recording()
    _, cache = in_steps(model, ids, mask, [LENGTH], cache)
    cache.crop(-9)
    other = torch.cat((ids[:, :31], tokens(2, LENGTH - 31, seed=3)), dim=1)
    logits, _ = in_steps(model, other[:, 31:], mask, [5, 1, LENGTH - 37], cache)
    expected = model(other, attention_mask=mask, use_cache=False).logits[:, 31:]
    assert difference(logits, expected) < 5e-5


@pytest.mark.parametrize("kind", ["default", "static"])
@pytest.mark.parametrize("pair", WAYS, ids=str)
@torch.no_grad()
def test_copies_of_a_cache_go_their_own_ways(pair: Pair, kind: str) -> None:
    model = pair.model()
    ids, mask = padded()
    prompt, ends = 34, [tokens(2, LENGTH - 34, seed) for seed in (4, 5)]
    _, cache = in_steps(model, ids[:, :prompt], mask, [prompt], CACHES[kind](model))
    for copied, end in zip((copy.deepcopy(cache), cache), ends, strict=True):
        steps = [1] * (LENGTH - prompt)
        logits, _ = in_steps(model, end, mask, steps, copied)
        whole = torch.cat((ids[:, :prompt], end), dim=1)
        expected, _ = in_steps(model, whole, mask, [prompt, *steps])
        assert difference(logits, expected[:, prompt:]) < 5e-5


@pytest.mark.parametrize("kind", ["default", "static"])
@pytest.mark.parametrize("pair", WAYS, ids=str)
@torch.no_grad()
def test_a_cache_that_was_reset_is_a_new_one(pair: Pair, kind: str) -> None:
    model = pair.model()
    ids, mask = padded()
    _, cache = in_steps(model, tokens(2, 40, seed=6), None, [40], CACHES[kind](model))
    cache.reset()
    steps = [35, 1, LENGTH - 36]
    logits, _ = in_steps(model, ids, mask, steps, cache)
    assert difference(real(logits), real(in_steps(model, ids, mask, steps)[0])) < 5e-5


@pytest.mark.parametrize("kind", ["default", "static"])
@pytest.mark.parametrize("pair", WAYS, ids=str)
@torch.no_grad()
def test_rows_of_a_cache_can_be_repeated_and_reordered(pair: Pair, kind: str) -> None:
    model = pair.model()
    ids, mask = padded()
    prompt = 34
    several, beams = (
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([1, 1, 2, 3]),
    )  # the beams of a prompt stay beside each other
    if kind == "static":  # has as many rows as it was made for
        _, cache = in_steps(model, ids[several, :prompt], mask[several], [prompt], CACHES[kind](model))
    else:
        _, cache = in_steps(model, ids[:, :prompt], mask, [prompt])
        cache.batch_repeat_interleave(2)
    ends = tokens(4, LENGTH - prompt, seed=7)
    whole = torch.cat((ids[several, :prompt], ends), dim=1)
    first, _ = in_steps(model, ends[:, :3], mask[several], [1] * 3, cache)
    expected, _ = in_steps(model, whole, mask[several], [prompt, *[1] * 6])
    assert difference(first, expected[:, prompt:-3]) < 5e-5
    cache.reorder_cache(beams)
    second, _ = in_steps(model, ends[:, 3:], mask[several], [1] * 3, cache)
    whole = torch.cat((whole[beams, :-3], ends[:, 3:]), dim=1)
    expected, _ = in_steps(model, whole, mask[several], [prompt, *[1] * 6])
    assert difference(second, expected[:, -3:]) < 5e-5


@pytest.mark.parametrize("pair", WAYS, ids=str)
@torch.no_grad()
def test_rows_can_be_dropped_where_nothing_is_kept_of_them(pair: Pair) -> None:
    model = pair.model()
    ids, mask = padded()
    _, cache = in_steps(model, ids[:, :34], mask, [34])
    cache.batch_select_indices(torch.tensor([1]))
    if pair.inside_attention:
        with pytest.raises(hfpos.PatchError, match="filled with a batch of 2 rows and is now used with 1"):
            in_steps(model, ids[1:, 34:], mask[1:], [1], cache)
        return
    logits, _ = in_steps(model, ids[1:, 34:], mask[1:], [1] * (LENGTH - 34), cache)
    assert difference(logits, model(ids, attention_mask=mask).logits[1:, 34:]) < 5e-5


@pytest.mark.parametrize("pair", WAYS, ids=str)
@torch.no_grad()
def test_skipped_ids_stay_with_the_cache(pair: Pair) -> None:
    model = pair.model()
    ids, positions = tokens(1, LENGTH), torch.arange(LENGTH)[None]
    positions = torch.where(positions < 20, positions, positions + 17)
    expected = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    steps = [LENGTH] if pair.pins_prompt else [10, 24, 1, LENGTH - 35]
    for kind, make in CACHES.items():
        cache, start = make(model), 0
        for step in steps:
            now = slice(start, start + step)
            output = model(ids[:, now], position_ids=positions[:, now], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            assert difference(output.logits, expected[:, now]) < 5e-5, (kind, start)
            start += step


@pytest.mark.parametrize("pair", WAYS, ids=str)
@torch.no_grad()
def test_bfloat16_decodes_as_it_prefills(pair: Pair) -> None:
    model = pair.model()
    ids, mask = padded()
    steps = [34, *[1] * (LENGTH - 34)]
    exact, _ = in_steps(model, ids, mask, steps)
    model.bfloat16()
    prompt = model(ids[:, :34], attention_mask=mask[:, :34]).logits.float()
    rounding = (real(prompt) - real(exact[:, :34])).abs().mean()
    decoded, _ = in_steps(model, ids, mask, steps)
    assert rounding < 0.02 * exact.abs().mean()
    assert (decoded[:, 34:].float() - exact[:, 34:]).abs().mean() < 1.5 * rounding


@torch.no_grad()
def test_gpt2_rotates_before_it_caches() -> None:
    model = hfpos.patch(unpatched("gpt2"), "rope", theta=300.0)
    same = torch.full((1, 20), 7)  # in the first layer the keys of equal tokens differ by their rotation alone
    keys = model(same, use_cache=True).past_key_values.layers[0].keys
    cos, sin = cos_sin(torch.arange(20), inverse_frequencies(300.0, 16).float())
    assert difference(keys, rotate(keys[:, :, :1].expand_as(keys), cos, sin)) < 1e-5
    assert difference(keys[:, :, 1], keys[:, :, 0]) > 0.1


@pytest.mark.parametrize("model_type", [*ROTARY, "bloom"])
@torch.no_grad()
def test_exact_caches_hold_unrotated_keys(model_type: str) -> None:
    own = {"original_length": ORIGINAL} if model_type in OWN_ATTENTION else {}
    model = hfpos.patch(unpatched(model_type), "dynamic", factor=4, **own)
    layer = 1 if model_type == "gemma3_text" else 0  # the other layer has a window and keeps its own rotation
    keys = model(torch.full((1, 9), 7), use_cache=True).past_key_values.layers[layer].keys
    if layer == 0:
        assert difference(keys, keys[:, :, :1].expand_as(keys)) < 1e-5


@pytest.mark.parametrize("model_type", [*ROTARY, "gpt2", *OWN_ATTENTION])
@torch.no_grad()
def test_a_mask_that_leaves_the_cache_out_is_refused(model_type: str) -> None:
    model = hfpos.patch(unpatched(model_type), "nope")
    _, cache = in_steps(model, tokens(1, 20), None, [20])
    step = tokens(1, 1)
    with pytest.raises(
        hfpos.PatchError, match="covers 1 tokens; expected one entry for each of the 20 tokens in the cache"
    ):
        model(step, attention_mask=torch.ones_like(step), past_key_values=cache)
