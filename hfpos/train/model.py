"""The model of a recipe: loaded or made anew, patched, with shifted attention and LoRA on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hfpos
from hfpos.checkpoint import load_tokenizer
from hfpos.data.corpus import train_tokenizer
from hfpos.data.sources import read_source
from hfpos.describe import describe
from hfpos.evaluate.load import require_tokenizer, without_loading_bars
from hfpos.scheme import PatchError, RopeScaling
from hfpos.train.lora import add_lora
from hfpos.train.packing_probe import check_packing


if TYPE_CHECKING:
    from torch import nn

    from hfpos.train.recipe import Recipe
    from hfpos.train.sections import Model


def load(recipe: Recipe) -> tuple[Any, Any]:
    """The unpatched model and its tokenizer.

    Raises:
        PatchError: they cannot be loaded or made.
    """
    section = recipe.model
    if section.config is not None:
        tokenizer = _tokenizer(recipe)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        return new_model(section, {"vocab_size": len(tokenizer)} | special), tokenizer
    options: dict[str, Any] = {"dtype": section.dtype}
    if section.attn_implementation is not None:
        options["attn_implementation"] = section.attn_implementation
    if section.quantization is not None:
        options["quantization_config"] = _quantization(section)
    path = str(section.path)
    if Path(path).is_dir():
        path = str(Path(path).resolve())  # an adapter notes where its base is, and is loaded from elsewhere
    with without_loading_bars():
        model = hfpos.from_pretrained(path, **options)
        tokenizer = load_tokenizer(section.tokenizer or section.path)  # type: ignore[arg-type]
    if hasattr(model, "peft_config"):
        raise PatchError(
            f"model.path={section.path} is a PEFT adapter; expected a whole model: merge it first (merge_and_unload, save_pretrained)"
        )
    require_tokenizer(tokenizer, section.path)  # type: ignore[arg-type]
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such CPUs bitsandbytes packs its weights anew in the first evaluation, and has no backward pass for them afterwards.
            module.support_avx512bf16_for_cpu = False
    return model, tokenizer


def put_together(recipe: Recipe, model: Any, tokenizer: Any) -> nn.Module:
    """Patch the loaded model and put on it what else the recipe asks for.

    Raises:
        PatchError: a scheme or a length that does not fit the model.
    """
    scheme = recipe.create_scheme()
    if scheme is not None:
        hfpos.patch(model, scheme, layers=recipe.layers, tokenizer=tokenizer)
    check_length(recipe, model)
    if recipe.data.packing == "documents":
        check_packing(model)
    if recipe.model.shifted_groups is not None:
        from hfpos.attention.shifted import shift_attention

        shift_attention(model, groups=recipe.model.shifted_groups)
    model = model if recipe.lora is None else add_lora(model, recipe.lora)
    _check_dtype(model)
    return model


def _check_dtype(model: nn.Module) -> None:
    if any(weight.requires_grad and weight.dtype == torch.float16 for weight in model.parameters()):
        raise PatchError(
            "the weights to train are float16, in which small updates are lost and losses overflow; set model.dtype to float32 or bfloat16"
        )


def check_length(recipe: Recipe, model: Any) -> None:
    """Raise `PatchError` where samples hold more positions than the patched model is meant for."""
    data = recipe.data
    key, longest = "data.length", data.length
    if data.positions is not None:
        key, longest = "data.positions.target_length", data.positions.target_length
    found = describe(model)
    bounded = found.scheme == "learned" or isinstance(recipe.create_scheme(), RopeScaling)
    if bounded and found.patched_length is not None and longest > found.patched_length:
        raise PatchError(
            f"{key}={longest} does not fit: {found.scheme} on {found.model} reaches {found.patched_length} tokens; raise the scheme's "
            f"factor or target_length, or set {key} to {found.patched_length} at most"
        )


def named_tokenizer(path: str) -> Any:
    """The tokenizer of a folder or hub name. Raises `PatchError` where there is none."""
    tokenizer = load_tokenizer(path)
    require_tokenizer(tokenizer, path)
    return tokenizer


def _tokenizer(recipe: Recipe) -> Any:
    wanted = recipe.model.tokenizer
    if not isinstance(wanted, int):
        return named_tokenizer(str(wanted))
    texts = []
    for source in recipe.data.sources:
        for _, text in read_source(source.path, source.text_column, source.split):
            if isinstance(text, PatchError):
                if recipe.data.skip_bad:
                    continue
                raise text
            texts.append(text)
    return train_tokenizer(texts, wanted)


def new_model(section: Model, from_tokenizer: dict[str, Any]) -> Any:
    """A model with random weights; what its config does not say is as `from_tokenizer` says.

    Raises:
        PatchError: the config makes no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = from_tokenizer | (section.config or {})
    kind = values.pop("model_type")
    dtype = torch.float32 if section.dtype == "auto" else getattr(torch, section.dtype)
    options = {} if section.attn_implementation is None else {"attn_implementation": section.attn_implementation}
    state = torch.random.get_rng_state()
    torch.manual_seed(section.seed)
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values), dtype=dtype, **options)
    except Exception as error:
        raise PatchError(
            f"model.config does not make a causal language model ({type(error).__name__}: {error})"
        ) from error
    finally:
        torch.random.set_rng_state(state)


def _quantization(section: Model) -> Any:
    """QLoRA's settings (arXiv 2305.14314): NormalFloat4 with its scales quantised again."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise PatchError(f"model.quantization={section.quantization} needs bitsandbytes; pip install 'hfpos[qlora]'")
    if section.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if section.dtype == "auto" else getattr(torch, section.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
