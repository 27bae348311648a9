"""Tiny pruned llamas, written by hand: the config, the plan and the widths agree, the weights are random."""

from __future__ import annotations

import torch

from hf_prune.config import MagnitudeConfig
from hf_prune.format import per_layer
from hf_prune.format.stock_guard import make_stock_refuse
from hf_prune.plan import PruningPlan

NUM_LAYERS, HIDDEN, HEAD_DIM, HEADS, GROUPS, MLP, VOCAB = 3, 32, 8, 4, 2, 48, 96


def pruned_plan(kept: dict[str, tuple[int, ...]]) -> PruningPlan:
    num_units = {}
    for layer in range(NUM_LAYERS):
        num_units |= {f"layers.{layer}.attention": GROUPS, f"layers.{layer}.mlp": MLP}
    return PruningPlan(
        model_type="llama",
        base_model_name_or_path="someone/dense-llama",
        num_units=num_units,
        kept_indices=kept,
        config=MagnitudeConfig(0.2),
        achieved=_achieved(kept),
    )


def _achieved(kept):
    per_unit = {"attention": 2 * HIDDEN * HEAD_DIM * (HEADS // GROUPS + 1), "mlp": 3 * HIDDEN}
    removed_units = {"attention": 0, "mlp": 0}
    for axis, units in kept.items():
        kind = axis.split(".")[-1]
        removed_units[kind] += {"attention": GROUPS, "mlp": MLP}[kind] - len(units)
    removed = sum(per_unit[kind] * count for kind, count in removed_units.items())
    decoder = NUM_LAYERS * (per_unit["attention"] * GROUPS + per_unit["mlp"] * MLP)
    rest = 2 * VOCAB * HIDDEN + (2 * NUM_LAYERS + 1) * HIDDEN
    units = sum(removed_units.values()) / (NUM_LAYERS * (GROUPS + MLP))
    return {"decoder": removed / decoder, "model": removed / (decoder + rest), "units": units}


def pruned_llama(uniform: bool = False):
    """A model with different widths per layer, or with one MLP width in all; and its plan."""
    from transformers import LlamaConfig, LlamaForCausalLM

    per_layer.install()
    if uniform:
        plan = pruned_plan({f"layers.{layer}.mlp": tuple(range(40)) for layer in range(NUM_LAYERS)})
    else:
        plan = pruned_plan({"layers.0.mlp": tuple(range(1, 41)), "layers.1.attention": (1,)})
    values = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 40 if uniform else MLP,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pruning_config": {
            "format": 1,
            "hf_prune_version": "0.1.0",
            "base_model_name_or_path": plan.base_model_name_or_path,
            "method": "magnitude",
            "settings": plan.config.to_dict(),
            "achieved": plan.achieved,
            "widths": plan.widths,
        },
    }
    if not uniform:
        values["per_layer_config"] = {
            "0": {"intermediate_size": 40},
            "1": {"num_attention_heads": 2, "num_key_value_heads": 1},
        }
        values = make_stock_refuse(values)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_dict(values)).eval()
    model._pruning_plan = plan
    return model, plan


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def logits(model):
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids).logits
