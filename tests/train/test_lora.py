"""LoRA on every family's attention; what a scheme learns, embeddings and norms are trained, saved and come back with the adapter."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hfpos
from hfpos.train.lora import add_lora, attention_projections
from hfpos.train.sections import Lora
from tests.tiny import tiny
from tests.train.runs import results


pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT's call
LLAMA = ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
TARGETS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "mixtral": LLAMA,
    "gemma2": LLAMA,
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "bloom": ["self_attention.dense", "self_attention.query_key_value"],
    "gpt_neox": ["attention.dense", "attention.query_key_value"],
    "phi": ["self_attn.dense", "self_attn.k_proj", "self_attn.q_proj", "self_attn.v_proj"],
    "falcon": ["self_attention.dense", "self_attention.query_key_value"],
    "gptj": ["attn.k_proj", "attn.out_proj", "attn.q_proj", "attn.v_proj"],
}


def trained(model, **section):
    """The adapted model after a step that moves all that may be trained."""
    adapted = add_lora(model, Lora(**section)).train()
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(2):  # LoRA's second factor is zero at first, so that the first one moves in the second step alone
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return adapted.eval(), ids


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


@pytest.mark.parametrize("family", TARGETS)
def test_the_projections_of_a_familys_attention_are_adapted_and_merge(family):
    model = tiny(family)
    assert attention_projections(model) == TARGETS[family]
    before = logits(model, torch.arange(3, 27)[None])
    adapted, ids = trained(model, r=2)
    layers = model.config.num_hidden_layers
    factors = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(factors) == 2 * layers * len(TARGETS[family])
    assert not torch.equal(logits(adapted, torch.arange(3, 27)[None]), before)
    expected = logits(adapted, ids)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), ids), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gpt_neox", "falcon"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_norms_are_saved_and_come_back(family, tied, tmp_path):
    base = tiny(family, tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted, ids = trained(model, r=2, train=("embeddings", "norms"))
    adapted.save_pretrained(tmp_path / "adapter")
    embeddings = base.get_input_embeddings().weight
    now = adapted.get_input_embeddings()
    now = getattr(now, "modules_to_save", {"default": now})["default"].weight
    assert not torch.equal(now, embeddings)
    head = adapted.get_output_embeddings()
    head = getattr(head, "modules_to_save", {"default": head})["default"].weight
    assert torch.equal(head, now) == tied
    restored = hfpos.from_pretrained(tmp_path / "adapter")
    expected = logits(adapted, ids)
    torch.testing.assert_close(logits(restored, ids), expected)
    merged = restored.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-5, atol=2e-5)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), ids), expected, rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("scheme", ["kerple", "fire"])
def test_what_a_scheme_learns_is_trained_through_a_recipe_and_comes_back(workshop, monkeypatch, scheme):
    ran = workshop.train(f"runs/lora-{scheme}", f"scheme={scheme}", "lora={r: 2}", "training.weight_decay=0.1")
    assert ran.code == 0, ran.error
    folder = workshop.folder / "runs" / f"lora-{scheme}"
    monkeypatch.chdir(workshop.folder)
    saved = load_file(folder / "model" / "adapter_model.safetensors")
    learned = {name: weight for name, weight in saved.items() if "hfpos" in name}
    assert learned, sorted(saved)
    model = hfpos.from_pretrained(folder / "model")
    fresh = dict(hfpos.patch(hfpos.from_pretrained("runs/tiny/base-llama/model"), scheme).named_parameters())
    found = {name: weight for name, weight in model.named_parameters() if "modules_to_save" in name}
    assert found
    for name, weight in found.items():
        start = next(
            each
            for key, each in fresh.items()
            if key.split(".")[-1] == name.split(".")[-1] and each.shape == weight.shape
        )
        assert not torch.equal(weight, start), name
    assert results(folder)["train"]["train_loss"] > 0


def test_a_recipe_names_the_layers(workshop, monkeypatch):
    ran = workshop.train(
        "runs/lora-named", "lora={r: 2, targets: [mlp.up_proj, lm_head]}", "scheme=yarn", "scheme.factor=4"
    )
    assert ran.code == 0, ran.error
    monkeypatch.chdir(workshop.folder)
    saved = load_file(workshop.folder / "runs/lora-named/model/adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition("layers.")[2] for name in saved} >= {"0.mlp.up_proj", "1.mlp.up_proj"}
    hfpos.from_pretrained("runs/lora-named/model")
