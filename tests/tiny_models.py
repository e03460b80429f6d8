"""A tiny random model of every causal LM class of transformers, by one rule for the fields of their configurations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 320
CONTEXT = 64

RULE: dict[str, Any] = {
    name: value
    for names, value in (
        ("vocab_size tokenizer_vocab_size unpadded_vocab_size vocab_size_per_layer_input", VOCABULARY),
        (
            "hidden_size n_embd d_model emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width hidden_dim",
            32,
        ),
        (
            "input_embedding_size output_embedding_size attention_hidden_size pronunciation_embed_dim shape_embed_dim",
            32,
        ),
        ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks", 2),
        ("num_encoder_layers num_decoder_layers num_layers_per_stack", 2),
        ("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
        ("attention_heads num_encoder_attention_heads num_decoder_attention_heads", 4),
        ("swa_num_attention_heads", 4),
        ("num_key_value_heads swa_num_key_value_heads num_kv_heads", 2),
        ("head_dim d_kv d_head dim_head swa_head_dim attention_head_size kv_channels", 8),
        ("qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim", 8),
        ("kv_lora_rank q_lora_rank qk_head_dim o_lora_rank hc_lowrank laurel_rank adapter_rank", 16),
        ("intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim d_inner dff dim_ff", 64),
        ("ffn_hidden_size feed_forward_size intermediate_size_mlp dense_intermediate_size", 64),
        ("prefix_dense_intermediate_size block_ff_dim shared_intermediate_size shared_experts_intermediate_size", 64),
        ("moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size", 16),
        ("moe_shared_expert_intermediate_size router_hidden_size hidden_size_per_layer_input", 16),
        ("num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num", 4),
        ("num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts", 2),
        ("n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group", 1),
        ("first_k_dense_replace num_dense_layers", 1),
        ("num_kv_shared_layers num_nextn_predict_layers num_mtp_layers", 0),
        ("mamba_d_state mamba_dt_rank state_size time_step_rank ssm_state_size d_rel", 8),
        ("mamba_n_heads mamba_num_heads", 8),
        ("mamba_d_head mamba_head_dim mamba_headdim linear_key_head_dim linear_value_head_dim linear_head_dim", 8),
        ("linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads", 2),
        ("index_head_dim", 16),
        ("n_groups mamba_n_groups mamba_ngroups num_mem_blocks o_groups", 1),
        ("chunk_size mamba_chunk_size block_size index_block_size", 16),
        ("index_topk rel_extent ple_embed_dim", 16),
        ("sliding_window attention_window_size sliding_window_size attention_chunk_size local_attention", 16),
        ("max_position_embeddings n_positions max_seq_len n_ctx max_target_positions context_length", CONTEXT),
        ("model_max_length", CONTEXT),
        ("pad_token_id", 0),
        ("bos_token_id eos_token_id sep_token_id cls_token_id decoder_start_token_id eod_token_id", 1),
    )
    for name in names.split()
}
"""What a field of that name is set to where it is a number; all that is not named here stays as the class has it."""

EMPTY = {"pad_token_id", "head_dim", "num_key_value_heads"}
"""Fields that are set even where the class leaves them empty."""

TABLE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        **{f"{part}_config": {"hidden_size_global": 32} for part in ("encoder", "decoder")},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"intermediate_size": [64, 64]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "reformer": {
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1], "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the rule does not get right, by `model_type`."""

NOT_MADE = {
    "gemma3n": "needs timm for its vision tower (its text model is gemma3n_text)",
    "gemma4_assistant": "drafts tokens for another model, whose keys and values it reads",
    "gemma4_unified_assistant": "drafts tokens for another model, whose keys and values it reads",
    "musicgen": "codes of sound, several at once, behind a text encoder",
    "musicgen_melody": "codes of sound, several at once, behind a text encoder",
}
"""Why there is no tiny model of a `model_type` here: a folder with its configuration alone is tried."""


def tiny_config(kind: str) -> Any:
    """A configuration of that `model_type`, as small as the rule and the table make it."""
    fields = _fields(CONFIG_MAPPING[kind])
    for name, value in TABLE.get(kind, {}).items():
        fields[name] = fields.get(name, {}) | value if isinstance(value, dict) else value
    return CONFIG_MAPPING[kind](**fields)


def tiny_model(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind)).eval()


def _fields(made: type[PretrainedConfig]) -> dict[str, Any]:
    default = made()
    fields: dict[str, Any] = {}
    for name in default.to_dict():
        value = default.__dict__.get(name)
        if isinstance(value, PretrainedConfig):
            fields[name] = _fields(type(value))
        elif name in RULE and (isinstance(value, int) or (value is None and name in EMPTY)):
            fields[name] = RULE[name]
        elif name in ("is_decoder", "causal"):
            fields[name] = True
    if "kv_lora_rank" in fields:  # latent attention has no groups of heads
        fields["num_key_value_heads"] = RULE["num_attention_heads"]
    return fields
