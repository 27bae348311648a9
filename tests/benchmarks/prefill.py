"""Prefill of a dense model against a pruned one, in turns in one process; JSON on stdout.

python tests/benchmarks/prefill.py [--dense DIR --pruned DIR] [--prompt-len 256] [--repeats 10] [--threads 1]

Without models, a random Llama and the same with half the MLP channels and half the attention groups.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_prune.evaluation import compare_prefill, num_parameters


def random_llama(kept: float) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=int(2048 * kept),
        num_hidden_layers=8,
        num_attention_heads=int(16 * kept),
        num_key_value_heads=int(8 * kept),
        head_dim=32,
    )
    return LlamaForCausalLM(config)


def load(path: str | None, kept: float) -> PreTrainedModel:
    return random_llama(kept) if path is None else AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense")
    parser.add_argument("--pruned")
    parser.add_argument("--prompt-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if (args.dense is None) != (args.pruned is None):
        parser.error("give both --dense and --pruned, or neither")
    dense, pruned = load(args.dense, 1.0), load(args.pruned, 0.5)
    comparison = compare_prefill(
        dense,
        pruned,
        prompt_len=args.prompt_len,
        batch_size=args.batch_size,
        repeats=args.repeats,
        num_threads=args.threads,
    )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine()}
    sizes = {"num_parameters_dense": num_parameters(dense), "num_parameters_pruned": num_parameters(pruned)}
    print(json.dumps({**asdict(comparison), **sizes, **versions}, indent=2))


if __name__ == "__main__":
    main()
