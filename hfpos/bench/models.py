"""The models that every scheme is tried on: the kinds that people use, decoders, encoders and encoder-decoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers

from hfpos.bench.shrink import causal_lm_classes, tiny_model


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DECODERS = """
    llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text gemma4_text phi phi3 phimoe phi4_multimodal
    olmo olmo2 olmo3 smollm3 granite cohere cohere2 starcoder2 stablelm gpt_neox gptj codegen falcon mpt bloom gpt2 opt biogpt
    xglm deepseek_v2 deepseek_v3 llama4_text gpt_oss
""".split()
_T5 = {"d_kv": 16, "d_ff": 96, "num_decoder_layers": 2}
# Those whose class does not follow from a model type, or whose kind goes by a setting
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon (alibi)": ("FalconForCausalLM", {"alibi": True}),
    "bert (encoder)": ("BertForMaskedLM", {"is_decoder": False}),
    "roberta (encoder)": ("RobertaForMaskedLM", {"is_decoder": False}),
    "t5": ("T5ForConditionalGeneration", _T5),
    "mt5": ("MT5ForConditionalGeneration", _T5),
}
MODELS = (*_DECODERS, *_OTHERS)


def build(name: str) -> PreTrainedModel:
    """The tiny model of one of `MODELS`, with the same weights each time.

    >>> type(build("mistral")).__name__
    'MistralForCausalLM'
    """
    if name in _OTHERS:
        class_name, overrides = _OTHERS[name]
        return tiny_model(getattr(transformers, class_name), **overrides)
    return tiny_model(causal_lm_classes()[name])
