"""`generate` in all its ways gives what the same search gives without any cache."""

import logging

import pytest
import torch
from transformers import PreTrainedModel

from tests.pairs import ORIGINAL, WAYS, Pair, tokens


NEW = 9  # tokens generated, from below to beyond the original length
SEARCHES = {
    "greedy": {},
    "4 beams": {"num_beams": 4, "num_return_sequences": 3},
    "3 samples": {"do_sample": True, "num_return_sequences": 3},
}
FOLLOWING = [pair for pair in WAYS if not pair.pins_prompt]  # the length of a text, not of its prompt


def prompts() -> dict[str, torch.Tensor]:
    """Two rows, the first left padded, just below the original length."""
    ids, mask = tokens(2, ORIGINAL - 3), torch.ones(2, ORIGINAL - 3, dtype=torch.long)
    ids[0, :6], mask[0, :6] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, **options: object) -> torch.Tensor:
    """`NEW` tokens for each prompt; the same seed for every call."""
    torch.manual_seed(0)
    calm = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
    return model.generate(**(calm | options))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("pair", FOLLOWING, ids=str)
def test_a_cache_changes_no_token(pair: Pair, search: str) -> None:
    model = pair.model()
    expected = generate(model, **prompts(), **SEARCHES[search], use_cache=False)
    assert torch.equal(generate(model, **prompts(), **SEARCHES[search]), expected)
    if search == "greedy":
        assert torch.equal(generate(model, **prompts(), prefill_chunk_size=10), expected)
    assert torch.equal(generate(model, **prompts(), **SEARCHES[search], cache_implementation="static"), expected)


@pytest.mark.parametrize("pair", [pair for pair in WAYS if pair.pins_prompt], ids=str)
def test_a_pinned_prompt_is_searched_alike_in_every_cache(pair: Pair) -> None:
    model = pair.model()
    ids = tokens(1, 40)  # beyond the original length, so that the pin matters
    for search in SEARCHES.values():
        dynamic = generate(model, input_ids=ids, **search)
        assert torch.equal(generate(model, input_ids=ids, **search, cache_implementation="static"), dynamic)
        if not search.get("do_sample"):
            batch = generate(model, **_with_padding(ids), **search)
            assert torch.equal(batch[-len(dynamic) :, 40:], dynamic[:, 40:])


def _with_padding(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """`ids` as the second row behind a shorter one."""
    batch, mask = ids.repeat(2, 1), torch.ones(2, ids.shape[1], dtype=torch.long)
    batch[0, :25], mask[0, :25] = 0, 0
    return {"input_ids": batch, "attention_mask": mask}


@pytest.mark.parametrize("pair", FOLLOWING, ids=str)
def test_assisted_generation_is_greedy_generation(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "transformers")  # Transformers warns of its own way to call the assistant
    model = pair.model()
    phrase = tokens(1, 7)
    ids = phrase.repeat(1, 4)  # repetitive, so that looking up the prompt finds candidates
    expected = generate(model, input_ids=ids, use_cache=False)
    assert torch.equal(generate(model, input_ids=ids, prompt_lookup_num_tokens=3), expected)
    for seed in (0, 1):  # one assistant guesses right, the other wrong: both accepted and cropped candidates
        assistant = pair.model(seed=seed)
        assert torch.equal(generate(model, input_ids=ids, assistant_model=assistant), expected)
