"""`torch.compile(fullgraph=True)`: no scheme breaks the graph, and decoding does not compile anew for every token."""

import shutil
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, StaticCache

import hfpos
from tests.pairs import ORIGINAL, PAIRS, Pair, difference, tokens


LENGTH = ORIGINAL + 5
ONE_LAYER = {
    "gpt2": {"n_layer": 1},
    "bloom": {"n_layer": 1},
    "falcon": {"num_hidden_layers": 1},
    "mpt": {"n_layers": 1},
    "gemma3_text": {},
}


def chosen(*names: str) -> list[Pair]:
    """The pairs whose names begin so, for each name the first one."""
    return [next(pair for pair in PAIRS if str(pair).startswith(name)) for name in names]


EVERY_SCHEME = chosen(
    *(f"llama-{scheme}" for scheme in sorted(hfpos.schemes()) if scheme not in ("learned", "encoder_decoder")),
    *(
        "llama-dynamic-cache",
        "gpt2-learned",
        "gpt2-rope",
        "gpt2-dynamic",
        "gpt2-alibi",
        "bloom-rope",
        "bloom-dynamic",
        "bloom-alibi",
        "falcon-alibi",
        "mpt-alibi",
    ),
)
PACKED = chosen("llama-yarn", "mistral-alibi", "gpt2-rope", "bloom-alibi")
DECODING = chosen(
    *("llama-yarn", "llama-dynamic-factor", "llama-dynamic-cache", "llama-longrope", "llama-alibi"),
    *("mistral-alibi", "gemma3_text-dynamic", "gpt2-rope", "bloom-alibi"),
)
TRAINING = chosen("llama-alibi", "llama-dynamic", "gpt2-rope", "bloom-alibi")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def model_of(pair: Pair) -> PreTrainedModel:
    """The patched model, as small as it can be."""
    return pair.model(**ONE_LAYER.get(pair.model_type, {"num_hidden_layers": 1}))


@pytest.mark.parametrize("pair", EVERY_SCHEME, ids=str)
@torch.no_grad()
def test_a_forward_is_one_graph(pair: Pair) -> None:
    model = model_of(pair)
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    logits = torch.compile(model, fullgraph=True, backend="eager")(ids, attention_mask=mask).logits
    assert difference(logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()]) < 5e-5


@pytest.mark.parametrize("pair", PACKED, ids=str)
@torch.no_grad()
def test_packed_documents_stay_apart_in_a_graph(pair: Pair) -> None:
    model = model_of(pair)
    ids = tokens(1, 30)
    positions = torch.cat((torch.arange(13), torch.arange(17)))[None]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert difference(compiled(ids, position_ids=positions).logits, model(ids, position_ids=positions).logits) < 5e-5


class Counter:
    """A backend that runs what it is given and counts how often it is asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Any:
        """Compile nothing."""
        self.graphs += 1
        return graph


@pytest.mark.parametrize("pair", DECODING, ids=str)
@torch.no_grad()
def test_decoding_with_a_static_cache_compiles_a_few_times_only(pair: Pair) -> None:
    check_decoding(model_of(pair))


@torch.no_grad()
def test_decoding_where_a_layer_with_a_window_follows_one_without() -> None:
    (pair,) = chosen("gemma3_text-alibi")
    check_decoding(pair.model(layer_types=["full_attention", "sliding_attention"]))


def check_decoding(model: PreTrainedModel) -> None:
    """Compile the prompt and the steps behind it, with a static cache."""
    ids, counter = tokens(1, LENGTH), Counter()
    cache, expected = (StaticCache(model.config, max_cache_len=LENGTH) for _ in range(2))
    shapes = model(ids[:, :1]).past_key_values.layers[0].keys.shape
    cache.early_initialization(1, shapes[1], shapes[3], torch.float32, torch.device("cpu"))
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    prompt = ORIGINAL - 6  # the steps cross the original length
    for start, end in ((0, prompt), *((i, i + 1) for i in range(prompt, LENGTH))):
        logits = compiled(ids[:, start:end], past_key_values=cache).logits
        assert difference(logits, model(ids[:, start:end], past_key_values=expected).logits) < 5e-5
    assert counter.graphs <= 4  # the prompt, a step, and a step of any length


@pytest.mark.parametrize("pair", TRAINING, ids=str)
def test_training_in_one_graph_has_the_same_gradients(pair: Pair) -> None:
    ids, results = tokens(2, LENGTH), []
    for backend in (None, "aot_eager"):
        model = model_of(pair).train()
        call = torch.compile(model, fullgraph=True, backend=backend) if backend else model
        cross_entropy(call(ids, use_cache=False).logits.flatten(0, 1), ids.flatten()).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*results, strict=True):
        assert difference(a, b) < 1e-4 * max(b.abs().max().item(), 1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_generated_code_gives_the_same_logits() -> None:
    (pair,) = chosen("llama-alibi")
    model = model_of(pair)
    ids = tokens(1, LENGTH)
    compiled = torch.compile(model, fullgraph=True)
    assert difference(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits) < 5e-5
