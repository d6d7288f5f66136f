"""`layers=` and `per_layer`: a scheme of its own in each layer, against references that are put together layer by layer."""

import copy
import json

import numpy
import pytest
import torch
import transformers

import hfpos
from tests.pairs import checkpointing, difference, tokens, trained, unpatched
from tests.tiny import tiny


LAYERS = {"num_hidden_layers": 4}
FULL, SLIDING = "full_attention", "sliding_attention"
SIZES = {
    "gpt2": {"n_layer": 4},
    "bloom": {"n_layer": 4},
    "gemma3_text": LAYERS | {"layer_types": [SLIDING, FULL, SLIDING, FULL]},
    "smollm3": LAYERS | {"layer_types": [FULL] * 4, "no_rope_layers": [1, 1, 1, 0]},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}


def four_layers(model_type):
    return unpatched(model_type, **SIZES.get(model_type, LAYERS))


def layer_by_layer(model, ids, rotaries):
    """The logits of a stock LLaMA whose layer i rotates by `rotaries[i]` (None: not at all), by a loop over its layers."""
    hidden = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    mask = torch.full((ids.shape[1], ids.shape[1]), torch.finfo(torch.float32).min).triu(1)[None, None]
    for layer, rotary in zip(model.model.layers, rotaries, strict=True):
        if rotary is None:
            cos, sin = model.model.rotary_emb(hidden, positions)
            table = torch.ones_like(cos), torch.zeros_like(sin)
        else:
            table = rotary(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=table)
    return model.lm_head(model.model.norm(hidden))


def yarn_rotary(model):
    config = copy.deepcopy(model.config)
    config.rope_parameters = YARN | {"rope_theta": config.rope_parameters["rope_theta"]}
    config.max_position_embeddings = 128
    return type(model.model.rotary_emb)(config)


@pytest.mark.parametrize("scheme", ["nope", "yarn"])
def test_some_layers_outputs_and_gradients(scheme):
    model, ids = four_layers("llama"), tokens(2, 51)
    own = model.model.rotary_emb
    other = None if scheme == "nope" else yarn_rotary(model)
    expected = layer_by_layer(model, ids, [own, other, own, other])
    expected.square().mean().backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    hfpos.patch(model, scheme, layers=[1, 3], **({} if scheme == "nope" else {"factor": 4}))
    found = model(ids).logits
    assert difference(found, expected) < 1e-5
    found.square().mean().backward()
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_nope_in_every_second_layer_is_smollm3():
    smol = tiny("smollm3", **SIZES["smollm3"] | {"no_rope_layers": [1, 0, 1, 0]})
    llama = tiny("llama", num_hidden_layers=4)
    values = {key: value for key, value in smol.config.to_dict().items() if key in llama.config.to_dict()}
    values |= {"model_type": "llama", "architectures": None, "transformers_version": None}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(values)).eval()
    llama.load_state_dict(smol.state_dict())
    ids = tokens(1, 40)
    hfpos.patch(llama, "nope", layers=[False, True, False, True])
    assert difference(llama(ids).logits, smol(ids).logits) < 1e-5


MIXED = {
    "llama": ["rope", "nope", "alibi", "yarn(factor=4)"],
    "gpt_neox": [None, "self_extend(factor=4)", "kerple", "dynamic(factor=4)"],
    "gpt2": ["yarn(factor=4)", "alibi", "nope", "self_extend(factor=4)"],
    "bloom": [None, "nope", "t5", "alibi(factor=4)"],
    "gemma3_text": ["nope", None, "linear(factor=2)", "fire(threshold=6.0)"],
}


@pytest.fixture(params=MIXED, scope="module")
def mixed(request):
    return trained(hfpos.patch(four_layers(request.param), "per_layer", schemes=MIXED[request.param]))


def test_decoding_is_a_full_forward(mixed):
    ids = tokens(2, 45)
    full = mixed(ids).logits
    cache, rows = None, []
    for piece in (ids[:, :17], *ids[:, 17:].split(1, dim=1)):
        output = mixed(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits)
    assert difference(torch.cat(rows, dim=1), full) < 2e-5


def test_left_padding_changes_nothing(mixed):
    ids = tokens(1, 37)
    padded = torch.nn.functional.pad(ids, (5, 0))
    mask = (torch.arange(42) >= 5).long()[None]
    assert difference(mixed(padded, attention_mask=mask).logits[:, 5:], mixed(ids).logits) < 2e-5


def test_checkpointing_gives_the_same_gradients(mixed):
    model, ids = copy.deepcopy(mixed), tokens(1, 40)
    model(ids, labels=ids).loss.backward()
    plain = [None if weight.grad is None else weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    checkpointing(model)(ids, labels=ids, use_cache=False).loss.backward()
    for weight, gradient in zip(model.parameters(), plain, strict=True):
        if gradient is not None:
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_eager_agrees(mixed):
    ids = tokens(1, 40)
    expected = mixed(ids).logits
    eager = hfpos.unpatch(copy.deepcopy(mixed))
    scheme = mixed.hfpos_record.scheme if hasattr(mixed, "hfpos_record") else None
    hfpos.patch(eager, scheme, backend="eager", prove=False)
    learned = {name: weight for name, weight in mixed.state_dict().items() if "hfpos_bias" in name}
    eager.load_state_dict(learned, strict=False)
    assert difference(eager(ids).logits, expected) < 2e-5


def test_saved_and_loaded(mixed, tmp_path):
    ids = tokens(1, 40)
    mixed.save_pretrained(tmp_path)
    again = hfpos.from_pretrained(tmp_path)
    assert difference(again(ids).logits, mixed(ids).logits) == 0
    assert hfpos.describe(again).layers == hfpos.describe(mixed).layers


def test_it_compiles_whole():
    model, ids = four_layers("llama"), tokens(1, 40)
    hfpos.patch(model, "per_layer", schemes=["yarn(factor=4)", "nope", None, "alibi"])
    expected = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert difference(compiled(ids, use_cache=False).logits, expected) < 1e-5


def test_bfloat16_keeps_frequencies_of_every_table():
    model = hfpos.patch(four_layers("llama"), "yarn", factor=4, layers=[2]).bfloat16()
    hook = next(h for h in model.model.rotary_emb._forward_hooks.values() if hasattr(h, "others"))
    assert hook.others[0].inv_freq.dtype == model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_unpatch_gives_the_model_back():
    model, ids = four_layers("gemma3_text"), tokens(1, 40)
    before, values = model(ids).logits, model.config.to_dict()
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    hfpos.unpatch(hfpos.patch(model, "nope", layers="full_attention"))
    assert torch.equal(model(ids).logits, before)
    assert model.config.to_dict() == values
    assert hooks == sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_sliding_layers_only_where_asked_for():
    model = four_layers("gemma3_text")
    hidden, positions = torch.zeros(1, 3, 4), torch.tensor([[0, 5, 90]])
    own = copy.deepcopy(model.model.rotary_emb)
    hfpos.patch(model, "yarn", factor=4, layers=SLIDING)
    for kind in (FULL, SLIDING):
        stock = own(hidden, positions, kind)
        first, second = model.model.rotary_emb(hidden, positions, kind).tables
        assert torch.equal(first[0], stock[0])
        assert torch.equal(second[0], stock[0]) == (kind == FULL)


def test_the_layers_of_the_default_are_the_plain_scheme():
    model = hfpos.patch(four_layers("gemma3_text"), "yarn", factor=4, layers="full_attention")
    assert hfpos.describe(model).scheme == "yarn"
    model = hfpos.patch(four_layers("llama"), "yarn", factor=4, layers=range(4))
    assert hfpos.describe(model).stock_loadable


@pytest.mark.parametrize(
    "layers",
    [
        numpy.array([1, 3]),
        [numpy.int64(1), numpy.int64(3)],
        torch.tensor([1, 3]),
        numpy.array([False, True, False, True]),
        torch.tensor([False, True, False, True]),
    ],
)
def test_indices_and_flags_of_numpy_and_torch(layers):
    model = hfpos.patch(four_layers("llama"), "nope", layers=layers)
    assert model.config.hfpos == hfpos.patch(four_layers("llama"), "nope", layers=[1, 3]).config.hfpos


@pytest.mark.parametrize("scheme", ["t5", "shaw"])
def test_a_bias_that_starts_at_zero_goes_into_layers_without_positions(scheme, tmp_path):
    model, ids = four_layers("smollm3"), tokens(1, 40)
    before = model(ids).logits
    hfpos.patch(model, scheme, layers=[3])
    torch.testing.assert_close(model(ids).logits, before)
    for weight in model.model.hfpos_bias.parameters():
        torch.nn.init.normal_(weight)
    after = model(ids).logits
    assert difference(after, before) > 1e-3
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(hfpos.from_pretrained(tmp_path)(ids).logits, after)
    linear = tiny("qwen3_next", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(hfpos.PatchError, match="layer 0 of Qwen3NextForCausalLM"):
        hfpos.patch(linear, scheme, layers=[0])


def test_types_of_layers_by_name():
    model = four_layers("gemma3_text")
    hfpos.patch(model, "per_layer", schemes={"full_attention": "nope"})
    full = [index for index, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    assert f"{full[0]}" in hfpos.describe(model).layers
    again = hfpos.patch(four_layers("gemma3_text"), "nope", layers="full_attention")
    assert torch.equal(model(tokens(1, 40)).logits, again(tokens(1, 40)).logits)


@pytest.mark.parametrize(
    ("model_type", "arguments", "said"),
    [
        ("llama", {"scheme": "nope", "layers": [True, False]}, "2 entries of True and False, the model has 4 layers"),
        ("llama", {"scheme": "nope", "layers": [0, 4]}, "expected indices from 0 to 3"),
        ("llama", {"scheme": "nope", "layers": [-1]}, "expected indices from 0 to 3"),
        ("llama", {"scheme": "nope", "layers": [1, 1]}, "twice"),
        ("llama", {"scheme": "nope", "layers": []}, "names no layer"),
        ("llama", {"scheme": "nope", "layers": 2}, "expected a list of indices"),
        ("llama", {"scheme": "nope", "layers": {1: "yarn"}}, "expected a list of indices"),
        ("llama", {"scheme": "nope", "layers": torch.tensor([[0, 1]])}, "is no layer of this model"),
        ("llama", {"scheme": "nope", "layers": "sliding_attention"}, "its types are 'full_attention'"),
        ("llama", {"scheme": "sinusoidal", "layers": [1]}, "acts on the embeddings"),
        ("llama", {"scheme": "per_layer", "schemes": ["nope"] * 4, "layers": [1]}, "not both"),
        ("llama", {"scheme": "per_layer", "schemes": ["nope"] * 3}, "3 schemes were given, the model has 4 layers"),
        ("llama", {"scheme": "per_layer", "schemes": [None] * 4}, "nothing would change"),
        ("llama", {"scheme": "per_layer", "schemes": "nope"}, "expected a list"),
        ("llama", {"scheme": "per_layer", "schemes": ["kerple", "t5", None, None]}, "both learned"),
        ("llama", {"scheme": "per_layer", "schemes": {"sliding_attention": "nope"}}, "no layers of type"),
        ("llama", {"scheme": "per_layer", "schemes": ["yarm(factor=4)", None, None, None]}, "did you mean 'yarn'"),
        ("llama", {"scheme": "per_layer", "schemes": ["yarn", None, None, None]}, "pass factor="),
        ("llama", {"scheme": "per_layer", "schemes": ["self_extend", None, None, None]}, "pass factor="),
        (
            "gemma3_text",
            {"scheme": "dynamic", "factor": 4, "layers": "sliding_attention"},
            "layers of type 'full_attention'",
        ),
        ("smollm3", {"scheme": "yarn", "factor": 4, "layers": [2, 3]}, "layer 3 of SmolLM3ForCausalLM"),
        ("gpt2", {"scheme": "alibi", "layers": [1]}, "to all layers at once"),
    ],
)
def test_bad_input_leaves_the_model_alone(model_type, arguments, said):
    model, ids = four_layers(model_type), tokens(1, 20)
    before = model(ids).logits
    with pytest.raises(hfpos.PatchError) as caught:
        hfpos.patch(model, **arguments)
    assert said in str(caught.value)
    assert torch.equal(model(ids).logits, before)


def test_parameters_are_json():
    scheme = hfpos.schemes.PerLayer(schemes=["yarn(factor=4)", None, hfpos.schemes.Alibi()])
    again = hfpos.schemes.PerLayer(**json.loads(json.dumps(scheme.parameters())))
    assert again == scheme
