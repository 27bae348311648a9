"""A small config of every causal LM type of transformers: the default config, shrunk attribute by attribute."""

from __future__ import annotations

from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, LAYERS = 48, 6, 3, 8, 40, 96, 4

_NAMES = (
    (
        HIDDEN,
        "hidden_size d_model n_embd dim emb_dim embedding_dim word_embed_proj_dim embed_dim input_embedding_size "
        "output_embedding_size embedding_size n_ctx_dim attention_hidden_size lru_width hidden_size_global "
        "cross_attention_hidden_size projector_output_dim ple_embed_dim backbone_hidden_size out_hidden_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads attention_heads num_heads "
        "num_encoder_attention_heads num_decoder_attention_heads linear_num_heads swa_num_attention_heads "
        "linear_num_value_heads linear_num_key_heads lightning_nh",
    ),
    (KV_HEADS, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"),
    (
        HEAD_DIM,
        "head_dim global_head_dim dim_head d_head swa_head_dim linear_head_dim linear_key_head_dim v_head_dim "
        "linear_value_head_dim qk_nope_head_dim attention_head_size kv_channels index_head_dim attention_head_dim d_kv "
        "mamba_d_head mamba_head_dim mamba_headdim query_pre_attn_scalar swa_v_head_dim",
    ),
    (
        MLP,
        "intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim dff dim_ff d_ff d_inner ffn_hidden_size "
        "feed_forward_size mlp_dim dense_intermediate_size intermediate_size_mlp feed_forward_proj_size",
    ),
    (
        24,
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
        "shared_intermediate_size moe_shared_expert_intermediate_size",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers num_blocks "
        "num_encoder_layers num_layers_per_stack depth",
    ),
    (VOCAB, "vocab_size decoder_vocab_size vocab_size_per_layer_input audio_vocab_size unpadded_vocab_size"),
    (
        64,
        "max_position_embeddings n_positions n_ctx max_target_positions max_source_positions max_seq_len "
        "context_length model_max_length rel_extent position_bias_max_distance",
    ),
    (
        4,
        "num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim qk_rope_head_dim d_rel "
        "index_n_heads mamba_dt_rank time_step_rank hc_lowrank router_hidden_size hc_rank",
    ),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts num_experts_per_topk"),
    (16, "kv_lora_rank q_lora_rank o_lora_rank latent_size"),
    (12, "qk_head_dim mamba_n_heads mamba_num_heads"),
    (96, "mamba_d_ssm"),
    (
        1,
        "n_group topk_group num_expert_group n_groups first_k_dense_replace num_dense_layers moe_layer_start_index "
        "mamba_n_groups mamba_ngroups",
    ),
    (6, "sliding_window sliding_window_size local_attention window_size attention_window_size index_topk"),
    (
        8,
        "mamba_d_state ssm_state_size state_size mamba_chunk_size chunk_size hidden_size_per_layer_input laurel_rank "
        "adapter_rank gated_norm_rank image_size_",
    ),
)
_SIZE = {name: value for value, names in _NAMES for name in names.split()}
_ALIKE = {48: 64, 40: 64, 24: 64, 6: 8, 3: 8, 12: 16}
"""Sizes that all differ → sizes that coincide: 64 and 8 wherever no relation between them forbids it."""
_DIFFER = dict(_SIZE)


def coincide(alike: bool) -> None:
    """Have `small_config` give sizes that coincide, or that differ."""
    _SIZE.update({name: _ALIKE.get(value, value) if alike else value for name, value in _DIFFER.items()})
    if alike:
        _SIZE.update(qk_head_dim=8 + 4, mamba_d_ssm=128)


_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1}

# What shrinking by name cannot know: relations between attributes, defaults that no real model has.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN4 = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_embed_dim": 48,
    "hc_lowrank": 5,
}
_HYBRID = ["mamba", "hybrid", "mamba", "hybrid"]
_BRIDGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},  # block-sparse attention makes its modules anew in short texts
    "codegen": {"n_head": 8, "rotary_dim": 4},  # the query, key and value projection has four blocks of heads
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}, "rope_parameters": _ROPE},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"o_groups": 2},
    "diffllama": {"num_key_value_heads": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 1, "intermediate_size": MLP},
    "dots3_note": {
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
        "vision_config": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    },
    "gemma4_assistant": {
        "__default__": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
        "text_config": {"num_kv_shared_layers": LAYERS},
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 12},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": _HYBRID, "attention_hidden_size": 96, "attention_head_dim": 16},
    "zamba2": {
        "layers_block_type": _HYBRID,
        "n_mamba_heads": 12,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 96,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def small_config(model_type: str) -> Any:
    """The default config of `model_type` with every size reduced, and with what its default lacks."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    bridge = dict(_BRIDGES.get(model_type, {}))
    defaults = cls(**bridge.pop("__default__", {})).to_dict()
    return cls.from_dict(merge(shrink(defaults), bridge))


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes` written over it, dictionaries merged."""
    result = dict(values)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merge(result[name], value) if both else value
    return result


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """All sizes in `values` reduced, nested configs too; lists with one entry per layer keep entries of every kind."""
    result = {}
    count = next((values[name] for name in _LAYER_COUNTS if isinstance(values.get(name), int)), None)
    per_layer = {name: value for name, value in values.items() if isinstance(value, list) and len(value) == count}
    overrides = {int(layer): value for layer, value in (values.get("per_layer_config") or {}).items()}
    rows = [(*row, repr(overrides.get(i))) for i, row in enumerate(zip(*per_layer.values(), strict=True))]
    layers = representative(rows)
    latent = "kv_lora_rank" in values  # multi-head latent attention: one key and value head per query head
    for name, value in values.items():
        if name == "per_layer_config" and overrides:
            result[name] = {str(layers.index(i)): shrink(overrides[i]) for i in layers if i in overrides}
        elif name == "head_dim" and "qk_nope_head_dim" in values:
            rope_only = value == values.get("qk_rope_head_dim")
            result[name] = _SIZE["qk_rope_head_dim"] if rope_only else _SIZE["qk_head_dim"]
        elif name == "num_key_value_heads" and latent:
            result[name] = HEADS if isinstance(value, int) else value
        elif name == "head_dim" and value is None:
            result[name] = HEAD_DIM
        elif name in per_layer and layers:
            result[name] = [value[layer] for layer in layers]
        elif isinstance(value, dict) and name not in ("id2label", "label2id"):
            result[name] = shrink(value)
        elif name.endswith("_token_id") or name.endswith("_token_index"):
            result[name] = _TOKENS.get(name, VOCAB - 2) if isinstance(value, int) and name != "eos_token_id" else None
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0 and name in _SIZE:
            result[name] = min(value, _SIZE[name]) if name in _COUNTS else _SIZE[name]
        else:
            result[name] = value
    return result


_COUNTS = {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "first_k_dense_replace", "num_dense_layers"}


def representative(rows: list[tuple[Any, ...]]) -> list[int]:
    """Indices of `LAYERS` layers, ascending, with every kind of row where possible."""
    if not rows:
        return []
    kinds: dict[str, int] = {}
    for index, row in enumerate(rows):
        kinds.setdefault(repr(row), index)
    chosen = list(kinds.values())[:LAYERS]
    chosen += [index for index in range(len(rows)) if index not in chosen][: LAYERS - len(chosen)]
    return sorted(chosen)
