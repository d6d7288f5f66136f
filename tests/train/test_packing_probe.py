"""Packed documents are kept apart, or the model is refused before it is trained on them."""

import pytest
import torch

import hfpos
from hfpos.train.packing_probe import check_packing
from tests.tiny import tiny


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("llama", None),
        ("llama", "alibi"),
        ("gpt2", None),
        ("gpt2", "rope"),
        ("bloom", "alibi"),
        ("bloom", "rope"),
        ("mistral", None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_apart(model, scheme, dtype):
    model = tiny(model).to(dtype).train()
    if scheme is not None:
        hfpos.patch(model, scheme)
    check_packing(model)
    assert model.training


@pytest.mark.parametrize("model", ["bloom", "falcon", "opt"])
def test_stock_models_that_read_on_into_the_next_document(model):
    with pytest.raises(hfpos.PatchError, match="does not keep documents apart"):
        check_packing(tiny(model))


def test_a_model_that_takes_no_positions():
    model = tiny("llama")
    model.forward = lambda input_ids, use_cache=None: None
    with pytest.raises(hfpos.PatchError, match="does not run with them"):
        check_packing(model)


def test_weights_that_are_not_there():
    with torch.device("meta"):
        check_packing(tiny("bloom"))
