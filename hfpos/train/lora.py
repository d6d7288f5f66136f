"""LoRA by PEFT: which layers of a family get it, and what else is trained and saved with the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hfpos.attention.learned import LEARNED, TABLE
from hfpos.patching import causal_model
from hfpos.scheme import PatchError


if TYPE_CHECKING:
    from hfpos.train.sections import Lora


def add_lora(model: nn.Module, lora: Lora) -> nn.Module:
    """Freeze a model and put LoRA on it; what its scheme has learned weights for is trained and saved too.

    LoRA: arXiv 2106.09685. `train=("embeddings", "norms")` is LongLoRA's (arXiv 2309.12307).

    Args:
        model: a causal language model, patched already, so that what its scheme learns is in it.
        lora: the recipe's section.

    Returns:
        the `PeftModel`; its saved folder says which scheme it was trained under.

    Raises:
        PatchError: peft is missing, or a target or a further module is not in the model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise PatchError("the recipe has lora:, and peft is not installed; pip install 'hfpos[peft]'") from error
    language: Any = causal_model(model)
    targets = list(lora.targets) if lora.targets else attention_projections(language)
    for name in lora.targets or ():
        if not _named(language, name):
            raise PatchError(
                f"lora.targets: no module of {type(language).__name__} is called {name!r}; see model.named_modules()"
            )
    saved = _saved(language, lora.train)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=saved or None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for name in targets for module in _named(language, name)),
        ensure_weight_tying=_tied(language) and "embeddings" in lora.train,
    )
    if getattr(language, "is_quantized", False):
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(model, config)


def attention_projections(model: nn.Module) -> list[str]:
    """The names of the linear layers in a model's attention, as LoRA targets.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> attention_projections(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=8)))
    ['attn.c_attn', 'attn.c_proj']
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        if "attention" not in type(module).__name__.lower():
            continue
        own = name.rpartition(".")[2]
        linear = [child for child, layer in module.named_children() if isinstance(layer, (nn.Linear, Conv1D))]
        found |= {f"{own}.{child}" for child in linear}
    if not found:
        raise PatchError(
            f"no linear layers were found in the attention of {type(model).__name__}; name them in lora.targets"
        )
    return sorted(found)


def _saved(model: Any, train: tuple[str, ...]) -> list[str]:
    """The modules that are trained whole: those asked for, and what the scheme learns."""
    names: set[str] = set()
    for word in train:
        if word == "embeddings":
            # a tied head too: PEFT, told to keep them tied, knows both by the name of lm_head and saves them once
            kept = [model.get_input_embeddings(), *([model.get_output_embeddings()] if _tied(model) else [])]
            names |= {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if any(module is each for each in kept)
            }
        elif word == "norms":
            names |= {
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if "norm" in type(module).__name__.lower()
            }
        elif _named(model, word):
            names.add(word)
        else:
            raise PatchError(
                f"lora.train: no module of {type(model).__name__} is called {word!r}; expected embeddings, norms or such a name"
            )
    names |= {LEARNED, TABLE} & {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return sorted(names)


def _named(model: nn.Module, name: str) -> list[nn.Module]:
    return [module for path, module in model.named_modules() if path == name or path.endswith(f".{name}")]


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight
