"""The estimate against what a real step takes, counted by the allocator's own events."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.optimization import Adafactor

import hfpos
from hfpos import PatchError
from hfpos.train.head import chunk_the_loss
from hfpos.train.memory import Layout, estimate, size
from hfpos.train.memory_advice import advice
from tests.tiny import tiny


# PEFT asks for the first; before Transformers 5.20 the second has no other name
pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_gradient_checkpointing|gradient_checkpointing_enable). is deprecated:FutureWarning"
)

OPTIMIZERS = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": lambda trained: torch.optim.AdamW(trained, fused=True),
    "adafactor": lambda trained: Adafactor(trained, scale_parameter=False, relative_step=False, lr=1e-3),
    "sgd": torch.optim.SGD,
}


def measured(
    model,
    *,
    length,
    batch_size=1,
    checkpointing=False,
    chunked_loss=False,
    mixed_precision="no",
    packed=False,
    steps=1,
    optimizer,
):
    """Bytes of all tensors at the peak of the second step, none of them counted by our own code."""
    model.train()
    stepper = OPTIMIZERS[optimizer]([weight for weight in model.parameters() if weight.requires_grad])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if chunked_loss:
        assert chunk_the_loss(model).chunked
    batch = {"input_ids": torch.randint(0, 4000, (batch_size, length))}
    batch["labels"] = batch["input_ids"]
    if packed:
        batch["position_ids"] = torch.cat([torch.arange(100), torch.arange(length - 100)])[None]

    def step():
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision == "bf16"):
                loss = model(**batch, use_cache=False).loss
            loss.backward()
            del loss
        stepper.step()
        stepper.zero_grad()

    step()
    states = [value for state in stepper.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    now = highest = sum(each.nbytes for each in (*model.parameters(), *model.buffers(), *states))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def llama(**changes):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 4000, "num_key_value_heads": 2} | sizes | changes))


def lora(model):
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    )


CASES = {
    "full": (llama, {"length": 1021}),
    "checkpointing": (lambda: llama(num_hidden_layers=4), {"length": 1200, "checkpointing": True}),
    "chunked loss": (llama, {"length": 2100, "chunked_loss": True}),
    "all together": (
        lambda: llama(tie_word_embeddings=True),
        {
            "length": 1300,
            "checkpointing": True,
            "chunked_loss": True,
            "batch_size": 2,
            "mixed_precision": "bf16",
            "steps": 2,
        },
    ),
    "packed": (llama, {"length": 901, "packed": True}),
    "bf16 weights": (lambda: llama().bfloat16(), {"length": 700}),
    "lora": (lambda: lora(llama()), {"length": 1024}),
    "lora, checkpointing": (lambda: lora(llama()), {"length": 2048, "checkpointing": True, "chunked_loss": True}),
    "gpt2": (lambda: tiny("gpt2", vocab_size=4000, n_positions=512), {"length": 512}),
    "experts": (lambda: tiny("mixtral", vocab_size=4000), {"length": 512}),
    "yarn": (lambda: hfpos.patch(tiny("llama", vocab_size=4000), "yarn", factor=16), {"length": 1000}),
    "learned bias": (lambda: hfpos.patch(tiny("llama", vocab_size=4000), "kerple"), {"length": 800}),
    "step of adamw": (lambda: llama(hidden_size=256), {"length": 16, "optimizer": "adamw_torch"}),
    "step of adafactor": (lambda: llama(hidden_size=256), {"length": 16, "optimizer": "adafactor"}),
    "sgd": (lambda: llama(hidden_size=256), {"length": 16, "optimizer": "sgd"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_a_step_takes(name):
    build, given = CASES[name]
    torch.manual_seed(0)
    model = build()
    settings = {"optimizer": "adamw_torch_fused", "chunked_loss": False} | given
    steps = settings.pop("steps", 1)
    found = estimate(model, **settings, gradient_accumulation_steps=steps, device="cpu").total
    truth = measured(model, **settings, steps=steps)
    assert found == pytest.approx(truth, rel=0.05), (size(found), size(truth))


def test_a_model_on_meta_gives_the_same_and_no_model_is_changed():
    model = llama().eval()
    with torch.device("meta"):
        empty = llama()
    modules, weights = dict(model.named_modules()), [weight.clone() for weight in model.parameters()]
    for settings in ({}, {"checkpointing": True, "chunked_loss": False, "evaluation_length": 300}):
        assert estimate(model, length=512, **settings) == estimate(empty, length=512, **settings)
    assert dict(model.named_modules()) == modules
    assert not model.training
    assert not model.model.gradient_checkpointing
    assert all(
        weight.grad is None and bool((weight == old).all())
        for weight, old in zip(model.parameters(), weights, strict=True)
    )
    assert not any("forward" in vars(module) for module in model.modules()), "the chunked loss stays off the model"


def test_long_rows_of_a_large_model_take_no_memory():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, max_position_embeddings=65536))
    found = estimate(model, length=65536, dtype=torch.bfloat16, checkpointing=True, layout=Layout(8, 8, 1, "all"))
    count = sum(weight.numel() for weight in model.parameters())
    assert found.optimizer == pytest.approx(count * 4 / 8, rel=1e-3)
    stream = 65536 * 4096 * 2
    assert 5 * stream < found.activations < 40 * stream


def test_what_processes_share():
    model = llama(num_hidden_layers=4, vocab_size=100)
    alone = estimate(model, length=256, gradient_accumulation_steps=2)
    weights = sum(weight.nbytes for weight in model.parameters())
    copies = estimate(model, length=256, gradient_accumulation_steps=2, layout=Layout(4, 4))
    assert copies.total - alone.total == copies.gradients - alone.gradients == weights  # DDP's buckets
    zero2 = estimate(model, length=256, gradient_accumulation_steps=2, layout=Layout(4, 4, 1, "gradients"))
    assert zero2.weights == alone.weights
    assert zero2.optimizer * 4 == pytest.approx(alone.optimizer, rel=1e-3)
    sharded = estimate(model, length=256, gradient_accumulation_steps=2, layout=Layout(4, 4, 1, "all"))
    assert sharded.optimizer == zero2.optimizer
    assert weights / 4 < sharded.weights < alone.weights
    halves = estimate(model, length=1024, layout=Layout(2, 1, 2, "all"))
    assert halves.activations == estimate(model, length=512, layout=Layout(2, 2, 1, "all")).activations


def test_evaluation_has_a_cache():
    model = llama()
    found = estimate(model, length=64, evaluation_length=5000)
    assert found.kv_cache == pytest.approx(
        2 * 2 * 2 * 16 * 5000 * 4, rel=0.01
    )  # layers, keys and values, heads, width
    assert found.evaluation > found.kv_cache + found.weights + found.optimizer
    assert estimate(model, length=64).evaluation == 0
    assert found.needed == found.evaluation + found.overhead


def test_dropout_costs_no_square_on_cuda():
    model = tiny("gpt2", n_positions=1024, attn_pdrop=0.1)
    cuda, cpu = (estimate(model, length=1024, device=device) for device in ("cuda", "cpu"))
    assert 5 * cuda.activations < cpu.activations


def test_quantised_weights():
    model = lora(llama(hidden_size=256, intermediate_size=512).bfloat16())
    full, four = (estimate(model, length=64, mixed_precision="bf16", weight_bits=bits) for bits in (None, 4))
    layers = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if not weight.requires_grad
        and weight.ndim == 2
        and not name.endswith(("embed_tokens.weight", "lm_head.weight"))
    )
    others = 2 * 4000 * 256 + 5 * 256  # made float32
    assert full.weights - four.weights == pytest.approx(layers * (2 - 0.516) - others * 2, rel=0.01)
    eight = estimate(model, length=64, mixed_precision="bf16", weight_bits=8)
    assert four.weights < eight.weights < full.weights + others * 2


def test_eight_bit_states():
    model = llama(hidden_size=256, intermediate_size=512)
    plain, eight, paged, offloaded = (
        estimate(model, length=64, **settings).optimizer
        for settings in (
            {},
            {"optimizer": "adamw_8bit"},
            {"optimizer": "paged_adamw_8bit"},
            {"optimizer_offload": True},
        )
    )
    embeddings = 4000 * 256  # Transformers keeps theirs in 32 bits
    assert eight == pytest.approx(embeddings * 8 + (plain / 8 - embeddings) * 2 * (1 + 4 / 256), rel=0.01)
    assert paged == offloaded == 0


def test_advice_stops_at_the_first_thing_that_fits_and_its_numbers_are_real():
    model = llama()
    settings = {"length": 1024, "batch_size": 2, "chunked_loss": False, "device": "cpu"}
    plain, chunked, both = (
        estimate(model, **settings | change).needed
        for change in ({}, {"chunked_loss": True}, {"chunked_loss": True, "checkpointing": True})
    )
    assert advice(model, both, **settings) == [
        f"chunked loss: {size(chunked)} instead of {size(plain)}",
        f"gradient checkpointing (training.gradient_checkpointing: true): {size(both)}",
    ]
    assert advice(model, plain, **settings) == []


def test_advice_goes_on_to_more_processes_and_says_when_nothing_helps():
    lines = advice(llama(num_hidden_layers=1), 2**20, length=512, batch_size=2, device="cpu", layout=Layout(32, 32))
    order = [
        "gradient_checkpointing",
        "per_device_train_batch_size: 1",
        "bf16",
        "lora:",
        "FSDP2",
        "sequence parallelism",
        "with all of that",
    ]
    places = [next((place for place, line in enumerate(lines) if word in line), None) for word in order]
    found = [place for place in places if place is not None]
    assert found == sorted(found)
    assert places[-1] == len(lines) - 1
    assert None not in places[4:6]


def test_advice_shortens_only_an_evaluation_that_is_what_does_not_fit():
    model = llama()
    training = estimate(model, length=128)
    (line,) = advice(model, training.needed, length=128, evaluation_length=8_000)
    assert line.startswith("no evaluation longer than")
    assert "evaluation.lengths" in line


def test_the_table():
    found = estimate(llama(), length=64, evaluation_length=64)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:7]] == [
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "loss",
        "total",
    ]
    assert size(found.total) in lines[6]
    assert "KV cache" in str(found)
    assert lines[0].endswith(found.moment)
    parts = dataclasses.asdict(found)
    assert found.total == sum(parts[name] for name in ("weights", "gradients", "optimizer", "activations", "loss"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"length": 1}, "length=1"),
        ({"length": 65}, "table of 64 positions"),
        ({"evaluation_length": 65}, "evaluation_length=65"),
        ({"optimizer": "adamw_tork"}, "did you mean 'adamw_torch'"),
        ({"optimizer": "adamw_tork", "optimizer_offload": True}, "did you mean 'adamw_torch'"),
        ({"mixed_precision": "bf61"}, "did you mean 'bf16'"),
        ({"weight_bits": 3}, "weight_bits=3"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_bad_input(settings, message):
    with pytest.raises(PatchError, match=message):
        estimate(tiny("gpt2"), **{"length": 64} | settings)


def test_bad_layouts_and_models():
    with pytest.raises(PatchError, match="processes=4 is not data=2 times sequence=1"):
        Layout(4, 2, 1)
    with pytest.raises(PatchError, match="shards='zero3'"):
        Layout(shards="zero3")
    with pytest.raises(PatchError, match="available_bytes=0"):
        advice(llama(), 0, length=64)
    with pytest.raises(PatchError, match="requires a gradient"):
        estimate(llama().requires_grad_(False), length=64)
    with pytest.raises(PatchError, match="head"):
        estimate(llama().model, length=64)
