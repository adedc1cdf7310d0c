"""A tiny random model of any causal family of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SIZES: dict[str, Any] = dict.fromkeys(
    ("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32
)
SIZES |= dict.fromkeys(("word_embed_proj_dim", "emb_dim"), 32)
SIZES |= dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 48)
SIZES |= dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "expert_ffn_hidden_size"), 48)
SIZES |= dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2)
SIZES |= dict.fromkeys(("decoder_layers", "encoder_layers"), 2)
SIZES |= dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2)
SIZES |= dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4)
SIZES |= dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4)
SIZES |= dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2)
SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
SIZES |= dict.fromkeys(("moe_num_experts", "zero_expert_num"), 4)
SIZES |= dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64)
SIZES |= {
    "vocab_size": 64,
    "d_inner": 64,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "sliding_window": 6,  # shorter than what is scored and drawn
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "v_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "linear_head_dim": 8,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 0,
    "initializer_range": 0.1,  # so that log-probs are far from uniform
    "init_std": 0.1,
    "is_decoder": True,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
MIXED = ["sliding_attention", "full_attention"]
LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # attention of a latent: as many as queries
SPECIAL: dict[str, dict[str, Any]] = dict.fromkeys(
    ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
    LATENT,
)
SPECIAL |= dict.fromkeys(("longcat_flash", "minicpm3", "youtu"), LATENT)
SPECIAL |= {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "mamba_n_groups": 1},
    "kimi_linear": {"num_experts_per_token": 2, "num_key_value_heads": 4},
    "gemma3": {
        "vision_config": {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 28,
        },
        "image_token_index": 63,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "gemma3_text": {"layer_types": MIXED},
    "gemma3n_text": {
        "layer_types": MIXED,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": None,
    },
    "zamba2": {
        "layer_types": ["mamba", "hybrid"],
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1],
    },
    "zaya": {"num_experts_per_tok": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "reformer": {
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 8,
    },
}


def families() -> list[str]:
    """Model types that AutoModelForCausalLM knows."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """A configuration of two narrow layers.

    Args:
        changes: keys of the family's own.
    """
    kind = CONFIG_MAPPING[family]
    default = kind().to_dict()
    own = {key: value for key, value in SIZES.items() if key in default}
    settings = own | SPECIAL.get(family, {}) | changes
    text = default.get("text_config")
    if isinstance(text, dict):
        inner = {key: value for key, value in SIZES.items() if key in text}
        settings["text_config"] = inner | {"model_type": text.get("model_type")}
        settings |= SPECIAL.get(family, {}) | changes
    return kind(**settings)


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random causal model, always the same.

    Raises:
        ValueError: it would not be tiny; whatever a family's own code raises.
    """
    config = tiny_config(family, **changes)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > 5e6:
        raise ValueError(f"it cannot be made small by the usual keys: {count:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(input_ids=torch.arange(16)[None] % 12 + 3, use_cache=False)  # or its sizes do not fit
    return model
