"""Tiny random models that read images and text, from configs; the sizes of both parts all differ."""

from __future__ import annotations

import functools
from typing import Any

import torch

IMAGE_TOKEN = 60
_TEXT = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
_TOWER = {**_VISION, "image_size": 16, "patch_size": 4}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_QWEN = {
    "depth": 2,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_heads": 2,
    "out_hidden_size": 48,
    "patch_size": 4,
}
_QWEN_IDS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 61, "vision_start_token_id": 62}
_SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}

SETTINGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_TOWER},
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": 16,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "head_dim": 8, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN, "window_size": 16, "fullatt_block_indexes": [1]},
        **_QWEN_IDS,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "head_dim": 8, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_QWEN_IDS,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": _TOWER,
        "image_token_id": IMAGE_TOKEN,
        "scale_factor": 2,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_TEXT},
        "vision_config": {"model_type": "pixtral", **_TOWER, "head_dim": 12},
        "image_token_index": IMAGE_TOKEN,
        "spatial_merge_size": 2,
    },
    "gemma3": {
        "text_config": {**_TEXT, **_SLIDING, "query_pre_attn_scalar": 8},
        "vision_config": {"model_type": "siglip_vision_model", **_TOWER},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE_TOKEN,
    },
    "gemma4": {
        "text_config": {
            **_TEXT,
            **_SLIDING,
            "global_head_dim": 12,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
        "vision_config": {
            **_TOWER,
            "head_dim": 12,
            "num_key_value_heads": 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        "image_token_id": IMAGE_TOKEN,
        "audio_config": None,
    },
}
"""Model type → its config."""


@functools.cache
def image_model(kind: str) -> Any:
    """The model of a kind, in float64, with noise on every parameter; one for all tests: not to be changed."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SETTINGS[kind])
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    return model


def image_batch(kind: str) -> dict[str, Any]:
    """One image of 16 × 16 among tokens, as the processor of a kind would give it."""
    generator = torch.Generator().manual_seed(3)
    before = [1, 62] if kind.startswith("qwen") else [1]
    num_tokens = 16 if kind == "llava" else 4
    ids = torch.tensor([[*before, *[IMAGE_TOKEN] * num_tokens, 5, 9, 14, 33]])
    batch: dict[str, Any] = {"input_ids": ids}
    shape: tuple[int, ...] = (1, 3, 16, 16)
    if kind.startswith("qwen"):
        shape = (16, 3 * 2 * 16)
        batch |= {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}
    elif kind == "smolvlm":
        shape = (1, 1, 3, 16, 16)
    elif kind == "mistral3":
        batch["image_sizes"] = torch.tensor([[16, 16]])
    elif kind == "gemma3":
        batch["token_type_ids"] = (ids == IMAGE_TOKEN).int()
    elif kind == "gemma4":
        shape = (1, 16, 3 * 16)
        places = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy")
        batch["image_position_ids"] = torch.stack(places, -1).reshape(1, 16, 2)
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return batch | {"pixel_values": torch.randn(*shape, generator=generator, dtype=torch.float64)}
