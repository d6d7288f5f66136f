"""Two processes that share a sequence compute what one does: DeepSpeed's Ulysses, and torch's context parallel with a ring for a CPU."""

import json
import sys
from datetime import timedelta

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hfpos
from hfpos.attention.sequence_parallel import heads_seen, require_ours
from tests.pairs import Pair, difference, tokens
from tests.processes import leave, torchrun


LENGTH, LOCAL = 48, 24  # of the whole sequence, beyond the trained length of 32, and of each process
ULYSSES = {
    "alibi": Pair("llama", "alibi"),
    "alibi as a bias tensor": Pair("llama", "alibi", {"bidirectional": True}),
    "packed": Pair("llama", "alibi"),
    "padded": Pair("llama", "alibi"),
    "bloom": Pair("bloom", "alibi"),
    "kerple": Pair("llama", "kerple"),
    "kerple packed": Pair("llama", "kerple", {"r1": [0.1, 0.3, 0.5, 1.0]}),
    "sandwich": Pair("llama", "sandwich"),
    "fire": Pair("llama", "fire"),
    "shaw": Pair("llama", "shaw"),
    "dynamic": Pair("llama", "dynamic", {"factor": 4.0}),
    "pinned": Pair("llama", "dynamic", {"cache": "pinned"}),
    "self_extend": Pair("llama", "self_extend", {"factor": 4.0}),
    "yarn": Pair("llama", "yarn", {"factor": 4.0}),
}
RING = {"ring alibi": Pair("llama", "alibi"), "ring yarn": Pair("llama", "yarn", {"factor": 4.0})}
ERRORS = {
    "patched too late": "patch the model first",
    "no position_ids": "no position_ids",
    "cache": "cannot decode from a cache",
    "sliding": "lose their window",
    "eager": "would see the future",
    "ring dynamic": "needs all keys at once",
    "ring bias tensor": "needs all keys at once",
    "ring packed": "hands on no mask",
}


def batch(case: str) -> dict[str, torch.Tensor]:
    """Token ids, true positions and, where there is padding, a mask, each (2, 48)."""
    positions = torch.arange(LENGTH).expand(2, -1).clone()
    inputs = {"input_ids": tokens(2, LENGTH), "position_ids": positions}
    if "packed" in case:  # documents that end inside a part and where one begins
        positions[0, 10:] -= 10
        positions[1, LOCAL:] -= LOCAL
    elif case == "padded":
        inputs["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
        inputs["attention_mask"][1, :30] = 0
        positions[1] = (positions[1] - 30).clamp(min=0)
    elif case == "ring alibi":  # as PoSE leaves out, so that the two parts have different middles
        positions[:, 40:] += 100
    return inputs


def compute(model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and the sum over real tokens of the loss of predicting a token from itself, which shows every gradient."""
    logits = model(**inputs, use_cache=False).logits
    ids = inputs["input_ids"].masked_fill(inputs.get("attention_mask", torch.ones(())) == 0, -100)
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def save(folder: str, case: str, model, inputs) -> None:
    """What one process computes from its part; the gradients are those of both."""
    logits, loss = compute(model.train(), inputs)
    loss.backward()
    for gradient in gradients(model).values():
        torch.distributed.all_reduce(gradient)
    torch.save((logits.detach(), gradients(model)), f"{folder}/{case}-{torch.distributed.get_rank()}.pt")


def message(model, inputs, **options) -> str:
    with pytest.raises(hfpos.PatchError) as error:
        model.train()(**inputs, **{"use_cache": False} | options)
    return str(error.value)


class Ulysses:
    """DeepSpeed's wrapper around an attention function of a model, for two processes and rows."""

    def __init__(self, model, name=None):
        self.model, self.name = model, name or model.config._attn_implementation

    def __enter__(self):
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        if self.model.config.model_type == "bloom":  # whose config does not say it, and DeepSpeed asks
            self.model.config.num_key_value_heads = self.model.config.n_head
        UlyssesSPAttentionHF.register_with_transformers(self.model, self.name, 2, 2)

    def __exit__(self, *error):
        from deepspeed.runtime.sequence_parallel import parallel_state_sp

        del ALL_ATTENTION_FUNCTIONS[self.name]  # leaves the one that was registered before
        parallel_state_sp._release_sequence_parallel_groups()


def ulysses_main(folder: str) -> dict[str, str]:
    """Saves the results of every case and returns the error messages."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which would be compiled here
    deepspeed.comm.init_distributed("gloo", verbose=False)
    rank, errors = torch.distributed.get_rank(), {}

    def part(case):
        return {key: value[:, rank * LOCAL : (rank + 1) * LOCAL] for key, value in batch(case).items()}

    for case, pair in ULYSSES.items():
        model = pair.model()
        with Ulysses(model):
            save(folder, case, model, part(case))
    model = ULYSSES["alibi"].model()
    with Ulysses(model):
        errors["no position_ids"] = message(model, {"input_ids": part("")["input_ids"]})
        cache = ULYSSES["yarn"].unpatched()(part("")["input_ids"], use_cache=True).past_key_values
        errors["cache"] = message(model, part(""), past_key_values=cache, use_cache=True)
    with Ulysses(ULYSSES["alibi"].unpatched(), "sdpa"), pytest.raises(hfpos.PatchError) as error:
        ULYSSES["alibi"].model()
    errors["patched too late"] = str(error.value)
    model = Pair("mistral", "alibi").model()
    with Ulysses(model):
        errors["sliding"] = message(model, part(""))
    model = ULYSSES["dynamic"].model()
    model.set_attn_implementation("hfpos_eager")
    with Ulysses(model):
        errors["eager"] = message(model, part(""))
    return errors


def ring_main(folder: str) -> dict[str, str]:
    """As `ulysses_main`, in torch's context parallel."""
    from accelerate.big_modeling import _attach_context_parallel_hooks
    from torch.distributed._functional_collectives import all_gather_tensor, all_gather_tensor_autograd
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh, errors = init_device_mesh("cpu", (2,)), {}

    def attend(index):
        """What the ring computes, without one, as torch has no ring for CPUs: own queries, the keys of all, one softmax."""
        every = all_gather_tensor(index, gather_dim=0, group=mesh)

        def attention(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False, **options):
            if attn_mask is not None or not is_causal:
                raise ValueError("a ring takes no mask")
            query, key, value = (x.to_local() for x in (query, key, value))
            key, value = (all_gather_tensor_autograd(x.contiguous(), gather_dim=2, group=mesh) for x in (key, value))
            mask = index[:, None] >= every
            return torch.ops.aten.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, enable_gqa=enable_gqa, **options
            )

        return attention

    def within(pair, case, action):
        model = pair.model()
        _attach_context_parallel_hooks(model)
        inputs, index = batch(case), torch.arange(LENGTH)
        buffers = [*inputs.values(), index]
        with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[1] * len(inputs) + [0]):
            kernel = torch.nn.functional.scaled_dot_product_attention
            names = kernel.__code__.co_freevars
            kernel.__closure__[names.index("target_fn")].cell_contents = attend(index)
            return action(model, inputs)

    for case, pair in RING.items():
        within(pair, case, lambda model, inputs, case=case: save(folder, case, model, inputs))
    errors["ring dynamic"] = within(ULYSSES["dynamic"], "", message)
    errors["ring bias tensor"] = within(ULYSSES["alibi as a bias tensor"], "", message)
    errors["ring packed"] = within(RING["ring alibi"], "packed", message)
    return errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left what they computed."""
    path = tmp_path_factory.mktemp("parts")
    torchrun("-m", __name__, str(path), DS_ACCELERATOR="cpu")
    return path


# The order in which context parallel deals a sequence out to two, so that each has as much to do.
DEALT = {0: [*range(12), *range(36, 48)], 1: [*range(12, 36)]}


@pytest.mark.parametrize("case", [*ULYSSES, *RING])
def test_two_processes_are_one(folder, case):
    model, inputs = (ULYSSES | RING)[case].model().train(), batch(case)
    logits, loss = compute(model, inputs)
    loss.backward()
    real = inputs.get("attention_mask", torch.ones(2, LENGTH)) == 1
    for rank in (0, 1):
        columns = DEALT[rank] if case in RING else list(range(rank * LOCAL, (rank + 1) * LOCAL))
        found, found_gradients = torch.load(folder / f"{case}-{rank}.pt")
        assert difference(found[real[:, columns]], logits[:, columns][real[:, columns]]) < 1e-5
        assert found_gradients.keys() == gradients(model).keys()
        for name, gradient in gradients(model).items():
            assert difference(found_gradients[name], gradient) < 1e-5 * max(gradient.abs().max().item(), 1), name


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_work_is_said(folder, case):
    for rank in (0, 1):
        assert ERRORS[case] in json.loads((folder / f"errors-{rank}.json").read_text())[case]


def test_a_replaced_function_is_noticed():
    ours = ALL_ATTENTION_FUNCTIONS["hfpos_sdpa"]
    model, ids = ULYSSES["alibi"].model(), tokens(1, 8)
    expected = model(ids).logits
    try:
        ALL_ATTENTION_FUNCTIONS["hfpos_sdpa"] = ALL_ATTENTION_FUNCTIONS["sdpa"]
        with pytest.raises(hfpos.PatchError, match=r"'hfpos_sdpa' was replaced by transformers\.integrations"):
            model(ids)
        ALL_ATTENTION_FUNCTIONS["hfpos_sdpa"] = lambda *args, **kwargs: ours(*args, **kwargs)
        require_ours("hfpos_sdpa", ours, "sdpa")
        assert torch.equal(model(ids).logits, expected)
    finally:
        del ALL_ATTENTION_FUNCTIONS["hfpos_sdpa"]


def test_ids_of_a_part_go_on_from_where_it_begins():
    # DeepSpeed gathers what the model's attention gets, and a flash kernel takes each 0 in it for a new document
    model, seen = ULYSSES["yarn"].model(), []
    model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    model(tokens(2, 6), position_ids=torch.tensor([[12, 13, 100, 0, 1, 7], [12, 13, 14, 15, 16, 17]]))
    assert seen == [[[12, 13, 14, 0, 1, 2], [12, 13, 14, 15, 16, 17]]]


def test_a_share_of_heads_of_unknown_origin_is_refused():
    assert heads_seen(None, 4, 4) == slice(None)
    with pytest.raises(hfpos.PatchError, match="2 of 4 heads"):
        heads_seen(None, 2, 4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    messages = ulysses_main(sys.argv[1]) | ring_main(sys.argv[1])
    with open(f"{sys.argv[1]}/errors-{torch.distributed.get_rank()}.json", "w") as file:  # noqa: PTH123
        json.dump(messages, file)
    leave()
