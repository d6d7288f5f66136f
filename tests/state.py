"""Everything of a model that a patch could touch, in a form that compares bit for bit."""

import json

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.pairs import tokens


STORES = ("_modules", "_parameters", "_buffers")


@torch.no_grad()
def logits(model, length=30):
    """Logits of two rows of seeded tokens; 30 are within what the models of `tests.pairs` were trained on."""
    return model(tokens(2, length)).logits


def structure(model, generation=True):
    """What hangs on each module: its class, identity, attributes, hooks, children, dtypes and modes; no numbers."""
    found = {}
    for name, module in model.named_modules():
        attributes = {key: id(value) for key, value in module.__dict__.items() if not isinstance(value, (dict, bool))}
        hooks = {key: list(map(id, value.values())) for key, value in module.__dict__.items() if "_hooks" in key}
        children = {store: {key: id(value) for key, value in module.__dict__[store].items()} for store in STORES}
        found[name] = (id(module), type(module), module.forward.__func__, attributes, hooks, children, module.training)
    tensors = {
        name: (value.dtype, value.device, value.requires_grad)
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    configs = {id(module.config): json.dumps(module.config.to_dict(), default=str) for module in configured(model)}
    limits = (id(model.generation_config), model.generation_config.to_dict()) if generation else ()
    return found, tensors, configs, limits, model.config._attn_implementation


def configured(model):
    """The modules that hold a config."""
    return [module for module in model.modules() if hasattr(module, "config")]


def numbers(model):
    """Copies of all weights and buffers, also of those that are not saved."""
    return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def shared():
    """What all models of the process share: the registries of Transformers."""
    return dict(ALL_ATTENTION_FUNCTIONS), dict(ROPE_INIT_FUNCTIONS)


class State:
    """The state of `model` now; `==` tells whether nothing at all has changed."""

    def __init__(self, model):
        self.structure = structure(model)
        self.numbers = numbers(model)
        self.shared = shared()
        self.logits = logits(model)

    def differences(self, other):
        """The names of what differs."""
        names = [
            f"structure {number}"
            for number, (mine, theirs) in enumerate(zip(self.structure, other.structure, strict=True))
            if mine != theirs
        ]
        if self.numbers.keys() != other.numbers.keys():
            names.append("names of tensors")
        else:
            names += [name for name, value in self.numbers.items() if not torch.equal(value, other.numbers[name])]
        if self.shared != other.shared:
            names.append("registries")
        if not torch.equal(self.logits, other.logits):
            names.append("logits")
        return names

    def __eq__(self, other):
        return not self.differences(other)
