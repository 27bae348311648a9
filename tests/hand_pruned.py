"""Models pruned by hand, for the tests of the loader: each with the dense model that has the same units masked."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

if TYPE_CHECKING:
    from pathlib import Path

VOCAB, HIDDEN, HEADS, GROUPS, HEAD_DIM, MLP = 96, 64, 4, 2, 16, 96
SMALL = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
LLAMA = SMALL | {
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
}
MLP_KEPT = torch.tensor([i for i in range(MLP) if i % 4 != 1])  # 72
HEADS_KEPT = [0, 2, 3]


@dataclass(frozen=True)
class HandPruned:
    """A dense model with units masked, and the config and weights of the pruned model that must agree with it."""

    masked: Any
    values: dict[str, Any]
    state: dict[str, torch.Tensor]

    def save(self, directory: Path, values: dict[str, Any] | None = None) -> Path:
        """Write config.json (`values`, default: made loud) and weights, without transformers' own saving."""
        import json

        from hf_prune.format.stock_guard import make_stock_refuse

        directory.mkdir(parents=True, exist_ok=True)
        values = make_stock_refuse(self.values) if values is None else values
        (directory / "config.json").write_text(json.dumps(values | {"architectures": [type(self.masked).__name__]}))
        save_file({k: v.contiguous() for k, v in self.state.items()}, directory / "model.safetensors", {"format": "pt"})
        return directory


def ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def entries(units: Any, size: int, offset: int = 0) -> torch.Tensor:
    """Positions of `units` in a dimension where each has `size` entries, from `offset` on."""
    return torch.cat([torch.arange(offset + u * size, offset + (u + 1) * size) for u in units])


class _Cut:
    """Cuts state dict tensors of one model, and masks the removed columns of the consumers in the dense model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def keep(self, name: str, dim: int, kept: torch.Tensor) -> None:
        self.state[name] = self.state[name].index_select(dim, kept)

    def consume(self, name: str, dim: int, kept: torch.Tensor) -> None:
        """As `keep`; also zeroes what goes in the dense model."""
        self.keep(name, dim, kept)
        weight = self.model.get_parameter(name)
        mask = torch.zeros(weight.shape[dim]).index_fill_(0, kept, 1.0)
        weight.data.mul_(mask.unsqueeze(1 - dim))

    def silence(self, *names: str) -> None:
        """Zero the last weights of a branch in the dense model."""
        for name in names:
            self.model.get_parameter(name).data.zero_()

    def drop(self, prefix: str) -> None:
        self.state = {name: tensor for name, tensor in self.state.items() if not name.startswith(prefix)}


def _dense(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # a larger spread than 0.02: differences must show in the logits
        if parameter.dim() > 1:
            parameter.data.mul_(4)
        elif parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model.eval()


def _llama_like(config: Any, skip_layer: int | None = 2) -> HandPruned:
    """Layer 0: KV group 1 and 72 MLP units stay; 1: one query head per group; `skip_layer` no attention; 3: no MLP."""
    cut = _Cut(_dense(config))
    first, second = "model.layers.0.", "model.layers.1."
    heads = entries([2, 3], HEAD_DIM)
    cut.keep(first + "self_attn.q_proj.weight", 0, heads)
    cut.keep(first + "self_attn.k_proj.weight", 0, entries([1], HEAD_DIM))
    cut.keep(first + "self_attn.v_proj.weight", 0, entries([1], HEAD_DIM))
    cut.consume(first + "self_attn.o_proj.weight", 1, heads)
    cut.keep(first + "mlp.gate_proj.weight", 0, MLP_KEPT)
    cut.keep(first + "mlp.up_proj.weight", 0, MLP_KEPT)
    cut.consume(first + "mlp.down_proj.weight", 1, MLP_KEPT)
    heads = entries([1, 2], HEAD_DIM)
    cut.keep(second + "self_attn.q_proj.weight", 0, heads)
    cut.consume(second + "self_attn.o_proj.weight", 1, heads)
    cut.silence(f"model.layers.{skip_layer}.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight")
    cut.drop(f"model.layers.{skip_layer}.self_attn")
    cut.drop("model.layers.3.mlp")
    per_layer = {
        "0": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": len(MLP_KEPT)},
        "1": {"num_attention_heads": 2},
        "2": {"skip": ["attention"]},
        "3": {"skip": ["mlp"]},
    }
    return HandPruned(cut.model, config.to_dict() | {"per_layer_config": per_layer}, cut.state)


def llama() -> HandPruned:
    from transformers import LlamaConfig

    return _llama_like(LlamaConfig(**LLAMA, tie_word_embeddings=False))


def mistral() -> HandPruned:
    from transformers import MistralConfig

    return _llama_like(MistralConfig(**LLAMA, sliding_window=5))


def llama_without_first_attention() -> HandPruned:
    from transformers import LlamaConfig

    config = LlamaConfig(**LLAMA)
    cut = _Cut(_dense(config))
    cut.silence("model.layers.0.self_attn.o_proj.weight")
    cut.drop("model.layers.0.self_attn")
    return HandPruned(cut.model, config.to_dict() | {"per_layer_config": {"0": {"skip": ["attention"]}}}, cut.state)


def phi3() -> HandPruned:
    from transformers import Phi3Config

    config = Phi3Config(**LLAMA, original_max_position_embeddings=64)
    cut = _Cut(_dense(config))
    layer = "model.layers.1."
    heads, queries, groups = entries([2, 3], HEAD_DIM), HEADS * HEAD_DIM, GROUPS * HEAD_DIM
    key, value = entries([1], HEAD_DIM, queries), entries([1], HEAD_DIM, queries + groups)
    cut.keep(layer + "self_attn.qkv_proj.weight", 0, torch.cat([heads, key, value]))
    cut.consume(layer + "self_attn.o_proj.weight", 1, heads)
    cut.keep(layer + "mlp.gate_up_proj.weight", 0, torch.cat([MLP_KEPT, MLP_KEPT + MLP]))
    cut.consume(layer + "mlp.down_proj.weight", 1, MLP_KEPT)
    per_layer = {"1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": len(MLP_KEPT)}}
    return HandPruned(cut.model, config.to_dict() | {"per_layer_config": per_layer}, cut.state)


def falcon() -> HandPruned:
    from transformers import FalconConfig

    config = FalconConfig(
        **SMALL, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=HEADS, ffn_hidden_size=MLP, bias=False
    )
    cut = _Cut(_dense(config))
    cut.keep("transformer.h.1.mlp.dense_h_to_4h.weight", 0, MLP_KEPT)
    cut.consume("transformer.h.1.mlp.dense_4h_to_h.weight", 1, MLP_KEPT)
    cut.silence("transformer.h.2.mlp.dense_4h_to_h.weight")
    cut.drop("transformer.h.2.mlp")
    per_layer = {"1": {"ffn_hidden_size": len(MLP_KEPT)}, "2": {"skip": ["mlp"]}}
    return HandPruned(cut.model, config.to_dict() | {"per_layer_config": per_layer}, cut.state)


def gpt2() -> HandPruned:
    """Heads by surgery, MLP width by per_layer_config."""
    from transformers import GPT2Config

    config = GPT2Config(
        **SMALL, n_embd=HIDDEN, n_layer=3, n_head=HEADS, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    cut = _Cut(_dense(config))
    layer = "transformer.h.1."
    heads = entries(HEADS_KEPT, HEAD_DIM)
    qkv = torch.cat([heads + part * HIDDEN for part in range(3)])
    cut.keep(layer + "attn.c_attn.weight", 1, qkv)
    cut.keep(layer + "attn.c_attn.bias", 0, qkv)
    cut.consume(layer + "attn.c_proj.weight", 0, heads)
    cut.keep(layer + "mlp.c_fc.weight", 1, MLP_KEPT)
    cut.keep(layer + "mlp.c_fc.bias", 0, MLP_KEPT)
    cut.consume(layer + "mlp.c_proj.weight", 0, MLP_KEPT)
    width = len(heads)
    modules = {
        "transformer.h.1.attn": {
            "shapes": {
                "c_attn.weight": [HIDDEN, 3 * width],
                "c_attn.bias": [3 * width],
                "c_proj.weight": [width, HIDDEN],
            },
            "attributes": {"num_heads": len(HEADS_KEPT), "split_size": width},
        }
    }
    values = config.to_dict() | {"per_layer_config": {"1": {"n_inner": len(MLP_KEPT)}}}
    cut.drop("lm_head")
    return HandPruned(cut.model, values | {"pruning_config": {"surgery": {"modules": modules}}}, cut.state)


def bloom() -> HandPruned:
    """Heads with their ALiBi slopes and the MLP, all by surgery."""
    from transformers import BloomConfig

    config = BloomConfig(**SMALL, hidden_size=HIDDEN, n_layer=3, n_head=HEADS)
    cut = _Cut(_dense(config))
    layer = "transformer.h.1."
    heads, qkv = entries(HEADS_KEPT, HEAD_DIM), entries(HEADS_KEPT, 3 * HEAD_DIM)
    cut.keep(layer + "self_attention.query_key_value.weight", 0, qkv)
    cut.keep(layer + "self_attention.query_key_value.bias", 0, qkv)
    cut.consume(layer + "self_attention.dense.weight", 1, heads)
    cut.keep(layer + "mlp.dense_h_to_4h.weight", 0, MLP_KEPT)
    cut.keep(layer + "mlp.dense_h_to_4h.bias", 0, MLP_KEPT)
    cut.consume(layer + "mlp.dense_4h_to_h.weight", 1, MLP_KEPT)
    modules = {
        "transformer.h.1.self_attention": {
            "shapes": {
                "query_key_value.weight": [len(qkv), HIDDEN],
                "query_key_value.bias": [len(qkv)],
                "dense.weight": [HIDDEN, len(heads)],
            },
            "attributes": {"num_heads": len(HEADS_KEPT)},
            "select_inputs": {"alibi": {"dim": 0, "sizes": [-1, HEADS], "factor": 1, "kept": HEADS_KEPT}},
        },
        "transformer.h.1.mlp": {
            "shapes": {
                "dense_h_to_4h.weight": [len(MLP_KEPT), HIDDEN],
                "dense_h_to_4h.bias": [len(MLP_KEPT)],
                "dense_4h_to_h.weight": [HIDDEN, len(MLP_KEPT)],
            },
        },
    }
    cut.drop("lm_head")
    return HandPruned(cut.model, config.to_dict() | {"pruning_config": {"surgery": {"modules": modules}}}, cut.state)


FAMILIES = {f.__name__: f for f in (llama, mistral, llama_without_first_attention, phi3, falcon, gpt2, bloom)}


@functools.cache
def _hand_pruned(family: str) -> HandPruned:
    from hf_prune.format import per_layer

    per_layer.install()
    return FAMILIES[family]()


def hand_pruned(family: str) -> HandPruned:
    """The pruned model of a family; a copy, free to be changed."""
    return copy.deepcopy(_hand_pruned(family))


def skip_only(family: str) -> dict[str, Any]:
    """Config in which layer 1 of a dense model of this family skips its attention, and layer 2 its MLP."""
    values = copy.deepcopy(_hand_pruned(family).values)
    values.pop("pruning_config", None)
    return values | {"per_layer_config": {"1": {"skip": ["attention"]}, "2": {"skip": ["mlp"]}}}
