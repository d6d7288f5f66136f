"""What Liger's kernels do to a model leaves a patch in place, whichever comes first. They need a GPU; what they replace does not."""

import types

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

import hfpos
from tests.pairs import Pair, difference, tokens


ORDERS = ("patched first", "patched later")
PAIRS = [
    Pair("llama", "alibi"),
    Pair("llama", "yarn", {"factor": 4.0}),
    Pair("llama", "dynamic", {"factor": 4.0}),
    Pair("llama", "self_extend", {"factor": 4.0}),
    Pair("llama", "nope"),
]


def rotate_in_place(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    """As Liger's rotation does where queries and keys of one head are contiguous."""
    for x in (q, k):
        half = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
        x.copy_(x * cos.unsqueeze(unsqueeze_dim) + half * sin.unsqueeze(unsqueeze_dim))
    return q, k


def on_gpus_only(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    """As Liger's rotation on a CPU."""
    raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")


def replace_forwards(model, monkeypatch, rotation) -> None:
    """What `_apply_liger_kernel_to_instance` replaces: forwards of instances, and the rotation of the model's module."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotation)
    for module in model.modules():
        if isinstance(module, (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP, transformers.LlamaForCausalLM)):
            module.forward = types.MethodType(type(module).forward, module)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@torch.no_grad()
def test_a_scheme_and_replaced_forwards(pair, order, monkeypatch):
    ids = tokens(2, 44)
    plain, expected = pair.unpatched()(ids).logits, pair.model()(ids).logits
    if order == "patched first":
        model = pair.model()
        replace_forwards(model, monkeypatch, rotate_in_place)
    else:
        model = pair.unpatched()
        replace_forwards(model, monkeypatch, rotate_in_place)
        hfpos.patch(model, pair.scheme, **pair.parameters)
    assert difference(model(ids).logits, expected) < 1e-5
    assert difference(hfpos.unpatch(model)(ids).logits, plain) < 1e-5


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.scheme in ("dynamic", "self_extend")], ids=str)
def test_a_rotation_that_cannot_be_tried_out_here_is_known_to_pair_halves(pair, monkeypatch):
    plain = modeling_llama.apply_rotary_pos_emb
    ids, expected = tokens(1, 44), pair.model()(tokens(1, 44)).logits
    monkeypatch.setattr(on_gpus_only, "__module__", "liger_kernel.transformers.rope")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", on_gpus_only)
    model = hfpos.patch(pair.unpatched(), pair.scheme, prove=False, **pair.parameters)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", plain)
    assert torch.equal(model(ids).logits, expected)
