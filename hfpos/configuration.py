"""The config of a patched model: a copy of its own, so that nothing shared with another model changes, and what is saved with it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from hfpos.attention.learned import LEARNED, TABLE
from hfpos.plan import Attribute, set_attribute
from hfpos.scheme import PatchError
from hfpos.version import __version__


if TYPE_CHECKING:
    import os

    from torch import nn

    from hfpos.scheme import Scheme

BLOCK = "hfpos"  # the key of config.json, and of adapter_config.json, that says which scheme the weights need

GUARD = "hfpos"  # stands for the model type, so that `AutoConfig` and `AutoModel` stop
HINT = "load with hfpos.from_pretrained"  # stands for a number, so that the model's own class stops
OWN = "own_"  # before the keys under which the block keeps what the two stand for


class _GuardedConfig:
    """Writes a config.json that only hfpos loads.

    A model whose scheme Transformers does not have would load as the plain base model, without a word. With a model type that
    stops `AutoModel`, and text in the place of a number that stops the model's own class, it fails instead, and the error names
    hfpos. `AutoTokenizer` falls back on the class that all configs share, which looks at neither. In memory the config is what it was.
    """

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Save with the marks that stop a stock loader."""
        values = json.loads(self.to_json_string(use_diff=use_diff))  # type: ignore[attr-defined]
        marks = {"model_type": GUARD, _whole_number(type(self)): HINT}
        decoder = self.get_text_config(decoder=True)  # type: ignore[attr-defined]
        for name in (name for name in self.sub_configs if getattr(self, name, None) is decoder):  # type: ignore[attr-defined]
            # the decoder's class would find its config inside this one
            marks[name] = values[name] | {_whole_number(type(decoder)): HINT}
        # a key "model_type" inside the block would make Transformers take the block for the model's own config
        values[BLOCK] |= {OWN + key: values[key] for key in marks if key in values}
        values |= marks
        Path(json_file_path).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read what is guarded too: when PEFT saves an adapter it asks the class of the model's config for the base's."""
        values, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return base_values(values) if BLOCK in values else values, rest

    def __reduce__(self) -> tuple:
        return _restore, (type(self).__mro__[2], self.__dict__)


def _whole_number(config_class: Any) -> str:
    """The first field of a config class that is a whole number and that the class which all configs share does not look at."""
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    whole = [field.name for field in dataclasses.fields(config_class) if field.type in (int, int | None)]
    return next(
        name for name in whole if name not in shared and not name.endswith(("vocab_size", "_layers", "_token_id"))
    )


@functools.cache
def _guarded_class(config_class: Any) -> type:
    return type(config_class.__name__, (_GuardedConfig, config_class), {"__module__": config_class.__module__})


def _restore(config_class: Any, state: dict[str, Any]) -> PreTrainedConfig:
    config = config_class.__new__(config_class)
    config.__dict__.update(state)
    config.__class__ = _guarded_class(config_class)
    return config


def guard(config: PreTrainedConfig) -> None:
    """Make `config` save itself so that no stock loader takes the model for its base."""
    config_class: Any = type(config)
    config.__class__ = _guarded_class(config_class)


def base_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a saved config.json as the unpatched model's config had them."""
    block = values[BLOCK]
    own = {key.removeprefix(OWN): value for key, value in block.items() if key.startswith(OWN)}
    return {key: value for key, value in values.items() if key != BLOCK and value != HINT} | own | block["base"]


def own_copy(root: nn.Module, config: Any, part: Any) -> tuple[Any, Any, list[Attribute]]:
    """A deep copy of a model's `config`, the same `part` of it, and the edits that give the copies to the modules that hold the originals.

    Args:
        root: the model as the caller holds it, wrappers included.
        config: the config of the whole model.
        part: the config of its decoder: `config` itself, or a part of a composite one (`text_config`).
    """
    copies = {id(config): copy.deepcopy(config)}
    for name in getattr(config, "sub_configs", None) or {}:
        if getattr(config, name, None) is not None:
            copies[id(getattr(config, name))] = getattr(copies[id(config)], name)
    if id(part) not in copies:
        raise PatchError(
            f"the decoder's {type(part).__name__} is not part of the model's {type(config).__name__}; what is changed there would not be saved"
        )
    edits = []
    for module in root.modules():
        held = module.__dict__.get("config")
        if id(held) in copies:
            edits.append(set_attribute(module, "config", copies[id(held)]))
    return copies[id(config)], copies[id(part)], edits


def part_name(config: Any, part: Any) -> str:
    """The attribute of a composite `config` that holds `part`."""
    return next(name for name in config.sub_configs if getattr(config, name, None) is part)


def reloads_equal(config: Any, part: Any) -> bool:
    """Whether the rope parameters of `part` are still the same after `config` has been saved and read again.

    Some config classes rewrite what they read (Phi-3 turns every `yarn` into a `longrope`).
    """
    try:
        again = type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    except Exception:
        return False
    again = again if part is config else getattr(again, part_name(config, part))
    written = json.loads(json.dumps(part.rope_parameters))
    return json.loads(json.dumps(again.rope_parameters)) == written


def changed_values(old: Any, new: Any) -> dict[str, Any]:
    """The values of `old` that are different in `new`, as JSON."""
    before, after = old.to_dict(), new.to_dict()
    return {key: before[key] for key in before if key in after and before[key] != after[key]}


def write_block(config: Any, stock_config: Any, scheme: Scheme, stock: bool) -> None:
    """Write into `config` what travels with the checkpoint of a patched model.

    Args:
        stock_config: the unpatched model's.
        stock: stock Transformers loads the model with equal logits; else its loaders are to refuse it.
    """
    block = {
        "version": __version__,
        "scheme": scheme.name,
        "parameters": scheme.parameters(),
        "base": changed_values(stock_config, config),
        "stock": stock,
    }
    setattr(config, BLOCK, block)
    if not stock:
        guard(config)


class _MarkedAdapter:
    """Stands in for `to_dict` of one PEFT config: what is saved in the adapter's folder also says which scheme it was trained under."""

    def __init__(self, adapter: Any, model: nn.Module) -> None:
        self.adapter = adapter
        self.model = model

    def __call__(self) -> dict[str, Any]:
        values = type(self.adapter).to_dict(self.adapter)
        block = getattr(self.model.config, BLOCK, None)
        return values if block is None else values | {BLOCK: block}


def mark_adapters(model: nn.Module, *args: Any) -> None:
    """State-dict pre-hook of a patched model: marks the configs of the PEFT adapters on it.

    PEFT's `save_pretrained` asks for the state dict first and writes `adapter_config.json` then; so adapters put on after patching are
    marked too. An adapter holds nothing else about positions, and would degrade in silence on a base without its scheme.

    Raises:
        PatchError: a bias or a table of positions was trained beside an adapter that would not hold it.
    """
    for name, module in model.named_modules() if getattr(model, "peft_config", None) else ():
        own = name.rpartition(".")[2]
        if own in (LEARNED, TABLE) and any(weight.requires_grad for weight in module.parameters(recurse=False)):
            raise PatchError(
                f"the learned weights of the scheme ({name}) are trained, and the adapter would not hold them; patch first, then "
                f"get_peft_model with modules_to_save=[{own!r}], or freeze them with requires_grad_(False)"
            )
    for adapter in getattr(model, "peft_config", {}).values():
        if not isinstance(adapter.__dict__.get("to_dict"), _MarkedAdapter):
            adapter.to_dict = _MarkedAdapter(adapter, model)
