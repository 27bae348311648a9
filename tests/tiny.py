"""A tiny llama with a tokenizer and texts, as a directory: what the command line and the README's lines work on."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

WORDS = [f"w{i}" for i in range(61)]


def write_text(path: Path, num_words: int, seed: int) -> Path:
    draw = random.Random(seed)
    path.write_text(" ".join(draw.choice(WORDS) for _ in range(num_words)) + "\n", encoding="utf-8")
    return path


def write_checkpoint(path: Path, *, num_layers: int = 2, max_position_embeddings: int = 128) -> Path:
    """A llama of hidden size 32, 4 query heads on 2 KV groups, 48 MLP channels, vocabulary 64; random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def write_demo_model(path: Path) -> Path:
    """What `hf_prune/demo_model` holds, tiny."""
    write_checkpoint(path, num_layers=3, max_position_embeddings=512)
    write_text(path / "calibration.txt", 32 * 256, seed=1)
    write_text(path / "evaluation.txt", 600, seed=2)
    return path
