"""What an engine would compute differently from a single process is refused before training, by name."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

import hfpos
from hfpos.train.parallel import processes_of_a_sequence, set_up
from hfpos.train.recipe import Recipe
from tests.tiny import tiny


def engine(kind=DistributedType.DEEPSPEED, sp=1, cp=1, zero=2, device="cpu", mixed_precision="no"):
    """What stands for an Accelerator on two processes."""
    parallelism = SimpleNamespace(
        sp_size=sp,
        cp_size=cp,
        sp_enabled=sp > 1,
        cp_enabled=cp > 1,
        sp_handler=SimpleNamespace(sp_attn_implementation="sdpa"),
    )
    state = SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(zero_stage=zero), fsdp_plugin=SimpleNamespace(fsdp_version=2)
    )
    return SimpleNamespace(
        distributed_type=kind,
        parallelism_config=parallelism,
        state=state,
        device=torch.device(device),
        mixed_precision=mixed_precision,
        num_processes=2,
    )


def ring(device="cpu"):
    return engine(DistributedType.FSDP, cp=2, device=device)


def recipe(packing="joined", length=64, shifted_groups=None, evaluation=None):
    return Recipe.parse(
        {
            "model": {"path": "m", "shifted_groups": shifted_groups},
            "data": {"sources": "b", "length": length, "packing": packing},
            "training": {"output_dir": "o"},
            "evaluation": evaluation,
        }
    )


def model(scheme=None, family="llama", **options):
    made = tiny(family, **options)
    return made if scheme is None else hfpos.patch(made, scheme)


GATE = {"data": "x", "lengths": [8], "max_regression": 0.01}


@pytest.mark.parametrize(
    ("given", "scheme", "options", "accelerator", "message"),
    [
        ({}, None, {}, ring(), "context parallelism has no kernel for a CPU"),
        ({}, "alibi", {}, ring("cuda"), "takes attention by 'sdpa' alone, and with alibi"),
        ({}, None, {"attn_implementation": "eager"}, ring("cuda"), "the model has 'eager'"),
        ({"packing": "documents"}, None, {}, ring("cuda"), "hands on no mask"),
        ({"length": 66}, None, {}, ring("cuda"), "data.length=66 cannot be divided by 4"),
        ({"shifted_groups": 2}, None, {}, ring("cuda"), "shifted"),
        ({"packing": "documents"}, None, {}, engine(sp=2), "hands no mask on to 'sdpa'"),
        ({}, None, {"attn_implementation": "eager"}, engine(sp=2), "without a causal mask"),
        ({}, "alibi", {"attn_implementation": "eager"}, engine(sp=2), "without a causal mask"),
        ({}, None, {"family": "mistral", "sliding_window": 16}, engine(sp=2), "lose their window under Ulysses"),
        (
            {},
            None,
            {"family": "gemma3_text"},
            engine(sp=2),
            "sliding_attention lose their window",
        ),
        ({}, None, {}, engine(sp=3), "shares 4 heads among 3 processes"),
        ({"length": 65}, None, {}, engine(sp=2), "data.length=65 cannot be divided by 2"),
        ({"shifted_groups": 2}, None, {}, engine(sp=2), "shifted"),
        ({"evaluation": GATE}, None, {}, engine(DistributedType.FSDP), "max_regression needs the unpatched"),
        ({"evaluation": GATE}, None, {}, engine(zero=3), "max_regression needs the unpatched"),
    ],
)
def test_refused(given, scheme, options, accelerator, message):
    implementation = options.get("attn_implementation")
    made = model(None, **{name: value for name, value in options.items() if name != "attn_implementation"})
    if implementation is not None:
        made.set_attn_implementation(implementation)
    if scheme is not None:
        hfpos.patch(made, scheme)
    with pytest.raises(hfpos.PatchError, match=message):
        set_up(recipe(**given), made, accelerator)


def test_fsdp_shards_weights_of_one_dtype():
    made = model("kerple").to(torch.bfloat16)
    assert {weight.dtype for weight in made.parameters()} == {torch.bfloat16, torch.float32}
    with pytest.raises(hfpos.PatchError, match=r"with kerple\(\) the model has torch.bfloat16, torch.float32"):
        set_up(recipe(), made, engine(DistributedType.FSDP))
    assert set_up(recipe(), made, engine(DistributedType.FSDP, mixed_precision="bf16")) == "FSDP2, 2 processes"


@pytest.mark.parametrize(
    ("given", "scheme", "accelerator", "name"),
    [
        ({}, "yarn", ring("cuda"), "FSDP2, context parallel 2, 2 processes"),
        ({}, "yarn", engine(sp=2), "DeepSpeed ZeRO-2, Ulysses 2, 2 processes"),
        ({"packing": "documents"}, "alibi", engine(sp=2), "DeepSpeed ZeRO-2, Ulysses 2, 2 processes"),
        ({"shifted_groups": 2, "packing": "documents"}, "yarn", engine(zero=3), "DeepSpeed ZeRO-3, 2 processes"),
        ({"evaluation": GATE}, "kerple", engine(DistributedType.MULTI_GPU), "DDP, 2 processes"),
    ],
)
def test_allowed(given, scheme, accelerator, name):
    made = tiny("llama")
    hfpos.patch(made, scheme, **({"factor": 4} if scheme == "yarn" else {}))
    assert set_up(recipe(**given), made, accelerator) == name
    parallelism = accelerator.parallelism_config
    assert processes_of_a_sequence(accelerator) == parallelism.sp_size * parallelism.cp_size
    if parallelism.sp_enabled:  # accelerate wraps the attention that the patched model has
        assert parallelism.sp_handler.sp_attn_implementation == made.config._attn_implementation
