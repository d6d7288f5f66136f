"""LoRA on 4-bit weights: an evaluation in between changes no gradient."""

import torch

from hfpos.data import train_tokenizer
from hfpos.train.model import load, put_together
from hfpos.train.recipe import Recipe
from tests.tiny import tiny


def gradients(folder, evaluate):
    values = {
        "model": {"path": str(folder), "dtype": "float32", "quantization": "4bit"},
        "data": {"sources": "b", "length": 8, "packing": "blocks"},
        "lora": {"r": 2},
        "training": {"output_dir": "o"},
    }
    recipe = Recipe.parse(values)
    torch.manual_seed(0)
    model = put_together(recipe, *load(recipe))
    ids = torch.arange(3, 40)[None]
    if evaluate:
        with torch.no_grad():
            model.eval()(input_ids=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def test_gradients_before_and_after_an_evaluation(tmp_path):
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    train_tokenizer(["to be or not to be"], 260).save_pretrained(tmp_path)
    expected, found = gradients(tmp_path, evaluate=False), gradients(tmp_path, evaluate=True)
    assert found.keys() == expected.keys()
    assert len(found) == 2 * 2 * 4
    first = [grad for name, grad in expected.items() if "layers.0" in name and "lora_B" in name]
    assert all(grad.abs().max() > 0 for grad in first)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)
