"""Perplexity against a brute-force scorer that holds all logits, and the refusals."""

import math

import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hfpos
from hfpos.evaluate import perplexity


VOCABULARY = 96
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 24},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "gpt2": {},
    "bloom": {},
}


def build(model_type="llama", **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        **TINY | {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "initializer_range": 0.3} | settings,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def build_dynamic():
    """A stock dynamic NTK model: its frequencies depend on the total length, past 32 tokens."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return build(max_position_embeddings=32, rope_parameters=rope)


def random_documents(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in sizes]


def brute_force(model, documents, length):
    """(sum of nll, tokens), from one forward a document that holds all logits, token by token in float64."""
    total, tokens = 0.0, 0
    for document in documents:
        if len(document) >= length:
            with torch.no_grad():
                logits = model(torch.tensor([document[:length]]), use_cache=False).logits[0].double()
            for position, token in enumerate(document[1:length]):
                total -= logits[position].log_softmax(-1)[token].item()
                tokens += 1
    return total, tokens


@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_brute_force(model_type):
    model = build(model_type, **FAMILIES[model_type])
    documents = random_documents(120, 64, 97, 30)
    result = perplexity(model, documents, [30, 64, 97], chunk=17)
    for length, documents_reached in ((30, 4), (64, 3), (97, 2)):
        nll, tokens = brute_force(model, documents, length)
        score = result.by_length[length]
        assert (score.tokens, score.documents) == (tokens, documents_reached)
        assert score.nll == pytest.approx(nll / tokens, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(score.nll))


@pytest.mark.parametrize(
    ("scheme", "parameters"), [("yarn", {"factor": 4}), ("alibi", {}), ("dynamic", {"factor": 4})]
)
def test_patched_equals_brute_force(scheme, parameters):
    model = hfpos.patch(build(max_position_embeddings=32), scheme, **parameters)
    documents = random_documents(120, 100)
    result = perplexity(model, documents, [20, 100], chunk=32)
    for length in (20, 100):
        nll, tokens = brute_force(model, documents, length)
        assert result.by_length[length].nll == pytest.approx(nll / tokens, rel=1e-5)


def test_length_dependent_model_is_run_once_per_length():
    model, documents = build_dynamic(), random_documents(128, 100)
    together = perplexity(model, documents, [48, 100, 128], chunk=30)
    for length in (48, 100, 128):
        # A fresh model each time: stock dynamic rotary remembers the longest call.
        nll, tokens = brute_force(build_dynamic(), documents, length)
        assert together.by_length[length].nll == pytest.approx(nll / tokens, rel=1e-5)


def test_one_forward_serves_all_lengths():
    model, documents = build(), random_documents(100, 100, 60)
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    together = perplexity(model, documents, [10, 40, 60, 100], batch_size=1)
    handle.remove()
    assert seen == [(1, 99), (1, 99), (1, 59)]
    for length in (10, 40, 60, 100):
        alone = perplexity(model, documents, [length], skip_bad=True).by_length[length]
        assert together.by_length[length].nll == pytest.approx(alone.nll, rel=1e-6)


@pytest.mark.parametrize("build_model", [build, build_dynamic])
@pytest.mark.parametrize(("chunk", "batch_size"), [(1, 1), (7, 2), (99, 3), (100, 5), (1024, 4)])
def test_chunk_and_batch_change_nothing(build_model, chunk, batch_size):
    documents = random_documents(110, 100, 100, 50, 50)
    expected = perplexity(build_model(), documents, [50, 100]).by_length
    found = perplexity(build_model(), documents, [50, 100], chunk=chunk, batch_size=batch_size).by_length
    for length, score in expected.items():
        assert found[length].nll == pytest.approx(score.nll, rel=1e-6)
        assert found[length].tokens == score.tokens


def test_logits_of_all_tokens_never_exist():
    model, sizes = build(), []
    model.lm_head.register_forward_hook(lambda _, args, output: sizes.append(output.shape[1]))
    perplexity(model, random_documents(100), [100], chunk=16)
    assert max(sizes) == 16


def test_bos_is_the_first_of_the_window():
    model, documents = build(bos_token_id=1), random_documents(64, 64)
    with_bos = [[1, *document] for document in documents]
    expected = perplexity(model, with_bos, [32, 65])
    assert perplexity(model, documents, [32, 65], bos="every-window") == expected
    assert perplexity(model, documents, [32, 65], bos="every-window", bos_token_id=1) == expected
    assert perplexity(model, with_bos, [32, 65], bos="every-window") == expected  # not put there twice
    assert perplexity(model, documents, [32], bos="every-window", bos_token_id=2) != expected


def test_tensors_and_lists_alike_and_mode_is_kept():
    model = build().train()
    documents = random_documents(40)
    expected = perplexity(model, documents, [40])
    assert perplexity(model, [torch.tensor(documents[0], dtype=torch.int32)], [40]) == expected
    assert perplexity(model, torch.tensor(documents), numpy.array([40])) == expected
    assert perplexity(model, (document for document in documents), [40]) == expected
    assert model.training


def test_result_is_a_table():
    text = str(perplexity(build(), random_documents(40, 20), [20, 40]))
    assert text.split()[:7] == ["length", "perplexity", "stderr", "nll", "bits/byte", "tokens", "documents"]
    assert [line.split()[0] for line in text.splitlines()[1:]] == ["20", "40"]


@pytest.mark.parametrize(
    ("documents", "arguments", "message"),
    [
        ([[1, 2, 3]], {"lengths": [2, 8]}, "the longest has 3 tokens"),
        ([], {"lengths": [2]}, "no documents"),
        ([1, 2, 3], {"lengths": [2]}, "document 0 is a int"),
        (["text"], {"lengths": [2]}, "tokenizer"),
        ([[0.5, 1.5]], {"lengths": [2]}, "document 0 .* 1-D"),
        ([[[1, 2]]], {"lengths": [2]}, "document 0 .* 1-D"),
        ([[1, VOCABULARY]], {"lengths": [2]}, "another model's tokenizer"),
        ([[1, 2, 3]], {"lengths": []}, "lengths="),
        ([[1, 2, 3]], {"lengths": [1]}, "lengths="),
        ([[1, 2, 3]], {"lengths": [2.0]}, "lengths="),
        ([[1, 2, 3]], {"lengths": [2], "bos": "last"}, "bos='last' is unknown"),
        ([[1, 2, 3]], {"lengths": [2], "bos_token_id": 1}, "bos_token_id=1"),
        ([[1, 2, 3]], {"lengths": [2], "bos": "every-window"}, "no bos_token_id"),
        ([[1, 2, 3]], {"lengths": [2], "chunk": 0}, "chunk=0"),
        ([[1, 2, 3]], {"lengths": [2], "batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_input(documents, arguments, message):
    with pytest.raises(hfpos.PatchError, match=message):
        perplexity(build(bos_token_id=None), documents, **arguments)


def test_model_without_a_head_or_without_enough_positions():
    config = AutoConfig.for_model("llama", **TINY, vocab_size=VOCABULARY)
    with pytest.raises(hfpos.PatchError, match="AutoModelForCausalLM"):
        perplexity(AutoModel.from_config(config), [[1, 2]], [2])
    with pytest.raises(hfpos.PatchError, match="32 learned positions, 40"):
        perplexity(build("gpt2", max_position_embeddings=32), random_documents(40), [40])


def test_loss_that_is_not_finite():
    model = build()
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    with pytest.raises(
        hfpos.PatchError, match="document 0: the loss of token 1 in the window of tokens 0 to 20 is nan"
    ):
        perplexity(model, random_documents(20), [20])
