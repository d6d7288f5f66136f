"""Edits: what each does, and that a plan is all or nothing."""

import copy
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from hfpos.plan import ABSENT, Attribute, Hook, Plan, Swap, freeze, own_attribute, set_attribute, swap_class


class Doubled(torch.nn.Linear):
    """Twice what a linear layer gives."""

    def forward(self, input):
        return 2 * super().forward(input)


def linear(width=2, dtype=torch.float32):
    return torch.nn.Linear(width, width, dtype=dtype)


ONES = torch.ones(1, 2)


def test_attribute_that_was_not_there_goes_again():
    layer = linear()
    edit = set_attribute(layer, "extra", 1)
    edit.apply()
    assert layer.extra == 1
    edit.undo()
    assert "extra" not in layer.__dict__
    assert own_attribute(layer, "forward") is ABSENT  # the class has it, the object not


def test_absent_is_one_object_also_in_copies():
    assert copy.deepcopy(ABSENT) is ABSENT
    assert pickle.loads(pickle.dumps(ABSENT)) is ABSENT


def test_attribute_of_any_store():
    layer = linear()
    assert own_attribute(layer, "weight") is layer.weight
    assert own_attribute(torch.nn.Sequential(layer), "0") is layer


def test_swap_follows_to_device_and_dtype():
    parent = torch.nn.Sequential(linear())
    old, new = parent[0], linear()
    edit = Swap(parent, "0", old, new)
    edit.apply()
    parent.to(torch.bfloat16)
    edit.undo()
    assert parent[0] is old
    assert old.weight.dtype == torch.bfloat16
    parent.to_empty(device="meta")
    edit.apply()
    assert not new.weight.is_meta


def test_class_swap():
    layer = linear()
    expected = layer(ONES)
    edit = swap_class(layer, Doubled)
    edit.apply()
    assert torch.equal(layer(ONES), 2 * expected)
    edit.undo()
    assert type(layer) is torch.nn.Linear
    assert torch.equal(layer(ONES), expected)


@pytest.mark.parametrize(
    "order",
    ["hook swap undo", "swap hook undo", "hook swap remove undo", "swap hook remove undo", "hook swap undo remove"],
)
def test_class_swap_under_a_hook_of_accelerate(order):
    layer = linear()
    expected = layer(ONES)
    edit, swapped = swap_class(layer, Doubled), False
    steps = {
        "hook": lambda: add_hook_to_module(layer, ModelHook()),
        "remove": lambda: remove_hook_from_module(layer),
        "swap": edit.apply,
        "undo": edit.undo,
    }
    for step in order.split():
        steps[step]()
        swapped = (swapped or step == "swap") and step != "undo"
        assert torch.equal(layer(ONES), 2 * expected if swapped else expected), step


def test_freeze_also_a_weight_that_was_replaced():
    layer = linear()
    edit = freeze(layer)
    edit.apply()
    assert not layer.weight.requires_grad
    layer.to_empty(device="meta")
    layer.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, assign=True)
    edit.undo()
    assert layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_hook():
    layer, calls = linear(), []
    edit = Hook(layer, "register_forward_pre_hook", lambda module, args: calls.append(module))
    edit.apply()
    layer(ONES)
    edit.undo()
    edit.undo()
    layer(ONES)
    assert calls == [layer]
    assert not layer._forward_pre_hooks


class Failing(Attribute):
    def apply(self):
        raise KeyboardInterrupt


def test_failing_edit_undoes_those_before_it_in_reverse():
    layer = linear()
    first, second = Attribute(layer, "extra", ABSENT, 1), Attribute(layer, "extra", 1, 2)
    with pytest.raises(KeyboardInterrupt):
        Plan((first, second, Failing(layer, "extra", 2, 3))).apply()
    assert "extra" not in layer.__dict__


def test_str():
    layer = linear()
    edits = (
        set_attribute(layer, "extra", "long " * 30),
        swap_class(layer, Doubled),
        Hook(layer, "register_forward_hook", print),
    )
    assert str(Plan(edits)).splitlines() == [
        "Linear.extra: absent -> 'long long long long long long long long long long long l...",
        "Linear.__class__: Linear -> Doubled",
        "Linear.register_forward_hook(print)",
    ]
