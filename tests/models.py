"""Tiny random models of the families that the laws are shown on, from configs; sizes differ where that is possible."""

from __future__ import annotations

import functools
import random
from typing import TYPE_CHECKING, Any

import torch

from hf_prune.config import PruningConfig, RandomConfig
from hf_prune.plan import PruningPlan, counted_units
from hf_prune.structure.inference import infer_structure
from hf_prune.structure.layouts import Fixed, Layout, Product, Units

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from hf_prune.structure.axes import Structure

VOCAB = 96
_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 64,
    **_IDS,
}
_MHA = {  # head_dim is hidden_size // num_attention_heads in these
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 64,
    **_IDS,
}
# For llama and gemma3_text the head count must divide the hidden size, or stock transformers refuses the config.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**_SHAPE, "tie_word_embeddings": False}),
    "llama_tied": ("llama", {**_SHAPE, "tie_word_embeddings": True, "num_key_value_heads": 2}),
    "mistral": ("mistral", {**_SHAPE, "num_hidden_layers": 2, "sliding_window": 5}),
    "qwen2": ("qwen2", {**_SHAPE, "hidden_size": 36, "num_hidden_layers": 2}),
    "qwen3": ("qwen3", {**_SHAPE, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}),
    "gemma3_text": (
        "gemma3_text",
        {
            **_SHAPE,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {**_SHAPE, "num_hidden_layers": 2, "head_dim": 8, "original_max_position_embeddings": 64}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": 40, "n_layer": 3, "n_head": 5, "n_inner": 56, "n_positions": 64, **_IDS},
    ),
    "opt": (
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": 40,
            "ffn_dim": 56,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 40,
            **_IDS,
        },
    ),
    "gpt_neox": ("gpt_neox", {**_MHA, "num_hidden_layers": 2, "rotary_pct": 0.5}),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 40, "n_layer": 3, "n_head": 5, **_IDS}),
    "falcon": (
        "falcon",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "ffn_hidden_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_kv_heads": 3,
            "new_decoder_architecture": True,
            "alibi": False,
            **_IDS,
        },
    ),
    "falcon_mqa": (
        "falcon",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "ffn_hidden_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "alibi": False,
            **_IDS,
        },
    ),
    "glm4": ("glm4", {**_SHAPE, "num_hidden_layers": 2}),
    "mixtral": (
        "mixtral",
        {**_SHAPE, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}
"""Name → model type and settings of its config."""
FAMILIES = tuple(SETTINGS)


def tiny_config(name: str) -> Any:
    """A fresh config of one of `FAMILIES`."""
    from transformers import CONFIG_MAPPING

    model_type, settings = SETTINGS[name]
    return CONFIG_MAPPING[model_type](**settings)


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """A fresh random model in evaluation mode, with noise on every parameter so that no norm or bias is trivial."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(name)
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    finally:
        torch.set_rng_state(state)
    if config.model_type == "mixtral" and dtype == torch.float64:
        model.set_experts_implementation("batched_mm")  # the grouped product has no float64 kernel
    return model.to(dtype).eval()


@functools.cache
def shared_model(name: str) -> PreTrainedModel:
    """One float64 model per process: do not change it."""
    return tiny_model(name)


@functools.cache
def shared_structure(name: str) -> Structure:
    """Structure of `shared_model`."""
    return infer_structure(shared_model(name))


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """int64 `[batch, length]` without special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a forward pass without cache."""
    with torch.no_grad():
        return model(input_ids=token_ids() if ids is None else ids, use_cache=False).logits


def make_plan(
    structure: Structure, kept: dict[str, tuple[int, ...]], config: PruningConfig | None = None
) -> PruningPlan:
    """A plan that keeps these units; what it says it achieved is not meant."""
    return PruningPlan(
        model_type=structure.model_type,
        base_model_name_or_path=None,
        num_units=counted_units(structure, kept),
        kept_indices=kept,
        config=config or RandomConfig(0.3),
        achieved={"decoder": 0.3, "model": 0.3, "units": 0.3},
    )


def random_kept(
    structure: Structure, rng: random.Random, kinds: tuple[str, ...] = ("attention", "query_heads", "mlp")
) -> dict[str, tuple[int, ...]]:
    """Any number of units, from one to all, of every prunable axis of these kinds; equally many of each block."""
    kept = {}
    for name, axis in structure.axes.items():
        if axis.prunable and axis.kind in kinds:
            each = axis.num_units // axis.num_blocks
            width, starts = rng.randint(1, each), range(0, axis.num_units, each)
            chosen = tuple(start + unit for start in starts for unit in sorted(rng.sample(range(each), width)))
            if len(chosen) < axis.num_units:
                kept[name] = chosen
    return kept


def permute_units_(
    model: PreTrainedModel, structure: Structure, axis: str, permutation: torch.Tensor, members: slice = slice(None)
) -> None:
    """Put unit `permutation[i]` of `axis` at place `i`; the model computes the same function. Modifies `model`."""
    state = model.state_dict()
    for member in structure.members[axis][members]:
        layout = structure.layouts[member.parameter][member.dim]
        where = positions(layout, axis, permutation)
        state[member.parameter].copy_(state[member.parameter].index_select(member.dim, where))


def positions(layout: Layout, axis: str, permutation: torch.Tensor) -> torch.Tensor:
    """Where the entries of a dimension come from when the units of `axis` are permuted: int64 `[size]`."""
    if isinstance(layout, Units):
        return permutation if layout.axis == axis else torch.arange(layout.num_units)
    if isinstance(layout, Fixed):
        return torch.arange(layout.length)
    found = [positions(child, axis, permutation) for child in getattr(layout, "factors", getattr(layout, "parts", ()))]
    if isinstance(layout, Product):
        result = torch.zeros(1, dtype=torch.int64)
        for inner in found:
            result = (result[:, None] * len(inner) + inner[None, :]).reshape(-1)
        return result
    offsets = [sum(len(part) for part in found[:i]) for i in range(len(found))]
    return torch.cat([part + offset for part, offset in zip(found, offsets, strict=True)])


def write_text(path: Path, num_words: int = 1500, seed: int = 0) -> str:
    """A file of made-up English; returns its path."""
    words = "the river old house light morning she walked slowly and never spoke of what had been said that winter"
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(words.split(), k=12)).capitalize() + "." for _ in range(num_words // 12)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def tiny_tokenizer(text_path: str) -> PreTrainedTokenizerFast:
    """A byte pair encoding of at most `VOCAB` tokens, trained on a file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    raw.train([text_path], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
