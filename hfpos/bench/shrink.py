"""Tiny seeded models of every causal language model class in Transformers, built from its own default config.

The defaults of a config class already say which features its models use (grouped heads, kinds of layers, rotary
dialect); only sizes are replaced. What no size rule can know stands in `_OVERRIDES`, one line per model type.
"""

from typing import Any, cast

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


TRAINED_LENGTH = 64
VOCABULARY = 128
PARAMETER_LIMIT = 12_000_000

_SIZES = {
    name: size
    for size, names in (
        (VOCABULARY, "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size"),
        (
            TRAINED_LENGTH,
            """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length
            original_max_position_embeddings""",
        ),
        (
            96,
            "intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size dff dim_ff encoder_ffn_dim decoder_ffn_dim",
        ),
        (
            64,
            """hidden_size d_model n_embd emb_dim embedding_size encoder_hash_byte_group_vocab
            hidden_size_global ngram_vocab_size_base""",
        ),
        (
            32,
            """qk_head_dim moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
            shared_intermediate_size shared_experts_intermediate_size""",
        ),
        (
            16,
            """head_dim swa_head_dim global_head_dim dim_head kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim
            rotary_dim kv_lora_rank q_lora_rank o_lora_rank linear_head_dim linear_key_head_dim linear_value_head_dim
            index_head_dim index_topk pronunciation_embed_dim shape_embed_dim ple_embed_dim d_rel""",
        ),
        (
            12,
            """sliding_window sliding_window_size window_size attention_window_size attention_chunk_size
            local_attention_window_len""",
        ),
        (
            8,
            """hidden_size_per_layer_input state_size chunk_size time_step_rank mamba_n_heads mamba_d_head mamba_d_state
            mamba_chunk_size mamba_dt_rank""",
        ),
        (
            4,
            """num_attention_heads n_head n_heads num_heads swa_num_attention_heads encoder_attention_heads
            decoder_attention_heads linear_num_heads num_experts num_local_experts n_routed_experts moe_num_experts
            split_ngram_parts hc_lowrank""",
        ),
        (
            2,
            """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads num_kv_heads
            swa_num_key_value_heads linear_num_key_heads linear_num_value_heads index_n_heads num_experts_per_tok
            num_experts_per_token moe_topk moe_k top_k_experts heads_per_ngram n_mamba_heads""",
        ),
        (1, """n_group topk_group num_expert_group n_shared_experts num_shared_experts first_k_dense_replace"""),
        (0, "num_kv_shared_layers num_nextn_predict_layers"),
    )
    for name in names.split()
}
# Wide enough that attention is far from uniform, so that a wrong position shows in the logits.
_SPREAD = {"initializer_range": 0.15, "init_std": 0.15}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ROPE_KEPT = ("rope_theta", "partial_rotary_factor", "llama_4_scaling_beta")
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16}

_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA_HEADS, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1},
    "dots3_note_text": {
        f"swa_{name}": 16
        for name in ("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim")
    }
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 32},
    "falcon_h1": {**_MAMBA_HEADS, "mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA_HEADS, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "mimo_v2_flash": {"head_dim": 24, "swa_head_dim": 24},  # a third of it is rotated
    "ministral": {"head_dim": 16},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [32, 32],
        "attention_head_size": 16,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def causal_lm_classes() -> dict[str, type[PreTrainedModel]]:
    """Every class that Transformers lists as a causal language model, by the model type of its own config.

    >>> causal_lm_classes()["llama"].__name__
    'LlamaForCausalLM'
    """
    names = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    classes = (getattr(transformers, name) for name in names)
    return {config_class(cls).model_type: cls for cls in classes}


def config_class(model_class: type[PreTrainedModel]) -> type[PreTrainedConfig]:
    """The class of the config that `model_class` is built from."""
    return cast("type[PreTrainedConfig]", model_class.config_class)


def tiny_config(cls: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """A config of this class with every size shrunk: width 64, 4 heads, 2 groups, 64 positions, one layer per kind.

    Context scalings that a class has by default are taken off, so that every model starts from plain RoPE.

    >>> from transformers import LlamaConfig
    >>> tiny_config(LlamaConfig, num_hidden_layers=3).num_hidden_layers
    3
    """
    defaults = cls()
    sizes: dict[str, Any] = {}
    values = defaults.to_dict()
    for name, value in values.items():
        if name in _SIZES and value is not None:
            sizes[name] = _SIZES[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, (int, list)):
            sizes[name] = _TOKENS.get(name, 3)
    sizes |= {name: spread for name, spread in _SPREAD.items() if name in values}
    if "is_decoder" in values:
        sizes["is_decoder"] = True
    if "kv_lora_rank" in sizes:  # latent attention has as many key heads as query heads
        sizes["num_key_value_heads"] = _SIZES["num_attention_heads"]
    if isinstance(layer_types := values.get("layer_types"), list):
        kinds = list(dict.fromkeys(layer_types))
        sizes["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    if rope := getattr(defaults, "rope_parameters", None):
        sizes["rope_parameters"] = _unscaled(rope)
    for name in cls.sub_configs:
        if isinstance(part := getattr(defaults, name, None), PreTrainedConfig):
            sizes[name] = tiny_config(type(part))
    return cls(**{**sizes, **_OVERRIDES.get(cls.model_type, {}), **overrides})


def _unscaled(rope: dict[str, Any]) -> dict[str, Any]:
    """The same rotary parameters without a context scaling; nested ones (a dict per kind of layer) keep their nesting."""
    if any(isinstance(value, dict) for value in rope.values()):
        return {kind: _unscaled(value) if isinstance(value, dict) else value for kind, value in rope.items()}
    if rope.get("rope_type", "default") == "default":
        return rope
    kept = {name: value for name, value in rope.items() if name in _ROPE_KEPT}
    return kept | {"rope_type": "default", "original_max_position_embeddings": TRAINED_LENGTH}


def tiny_model(model_class: type[PreTrainedModel], seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A small float32 model in eval mode with seeded weights; norms and biases are random too, as no default hides errors.

    Raises ValueError where the shrunk model would still have more parameters than `PARAMETER_LIMIT`.
    """
    config = tiny_config(config_class(model_class), **overrides)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > PARAMETER_LIMIT:
        raise ValueError(f"{size / 1e6:.0f} million parameters left after shrinking")
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model
