"""`torch.compile(fullgraph=True)`: no scheme breaks the graph, and decoding does not compile anew for every token."""

import shutil

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from tests.pairs import ORIGINAL, PAIRS, WAYS, Pair, difference, tokens


LENGTH = ORIGINAL + 8


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Nothing compiled for an earlier test counts."""
    torch._dynamo.reset()


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@torch.no_grad()
def test_a_forward_is_one_graph(pair: Pair) -> None:
    model = pair.model()
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    plain = compiled(ids, use_cache=False).logits
    assert difference(plain, model(ids, use_cache=False).logits) < 5e-5
    padded = compiled(ids, attention_mask=mask, use_cache=False).logits
    assert difference(padded[mask.bool()], model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]) < 5e-5


@pytest.mark.parametrize("pair", WAYS, ids=str)
@torch.no_grad()
def test_packed_documents_stay_apart_in_a_graph(pair: Pair) -> None:
    model = pair.model()
    ids = tokens(1, 30)
    positions = torch.cat((torch.arange(13), torch.arange(17)))[None]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert difference(compiled(ids, position_ids=positions).logits, model(ids, position_ids=positions).logits) < 5e-5


class Counter:
    """A backend that runs what it is given and counts how often it is asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        """Compile nothing."""
        self.graphs += 1
        return graph


def static_cache(model: PreTrainedModel) -> StaticCache:
    """Room for `LENGTH` tokens."""
    return StaticCache(model.config, max_cache_len=LENGTH)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@torch.no_grad()
def test_decoding_with_a_static_cache_compiles_a_few_times_only(pair: Pair) -> None:
    model, counter = pair.model(), Counter()
    ids = tokens(1, LENGTH)
    cache, expected = static_cache(model), static_cache(model)
    prompt = ORIGINAL - 6  # the steps cross the original length
    model(ids[:, :prompt], past_key_values=cache)
    model(ids[:, :prompt], past_key_values=expected)
    step = torch.compile(model, fullgraph=True, backend=counter)
    for i in range(prompt, LENGTH):
        logits = step(ids[:, i : i + 1], past_key_values=cache).logits
        assert difference(logits, model(ids[:, i : i + 1], past_key_values=expected).logits) < 5e-5
    assert counter.graphs <= 3


@pytest.mark.parametrize("pair", WAYS, ids=str)
def test_training_in_one_graph_has_the_same_gradients(pair: Pair) -> None:
    ids = tokens(2, LENGTH)
    results = []
    for compiled in (False, True):
        model = pair.model().train()
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        call(ids, labels=ids, use_cache=False).loss.backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*results, strict=True):
        assert difference(a, b) < 1e-4 * max(b.abs().max().item(), 1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("pair", [pair for pair in WAYS if pair.model_type == "llama" and pair.scheme == "alibi"], ids=str)
@torch.no_grad()
def test_generated_code_gives_the_same_logits(pair: Pair) -> None:
    model = pair.model(num_hidden_layers=1)
    ids = tokens(1, LENGTH)
    compiled = torch.compile(model, fullgraph=True)
    assert difference(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 5e-5
