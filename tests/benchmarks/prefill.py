"""Prefill speed of the reference model at 50 % with aligned widths, against what its FLOP count predicts.

    OMP_NUM_THREADS=1 python tests/benchmarks/prefill.py

Dense and pruned run in turns in one process, on random tokens; the ratio is that of the medians. FLOPs are those of the
matrix products: linear layers, attention (only the causal half, as the fused kernel skips the rest), and the logits of
the last position. Reads the model from `HF_PRUNE_DATA` (default `../shared`).
"""

import os
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_prune import MagnitudeConfig, prune
from hf_prune.evaluation import compare_prefill

SHARED = Path(os.environ.get("HF_PRUNE_DATA", Path(__file__).parents[3] / "shared"))
SETTINGS = ((1, 256), (1, 512), (4, 256), (4, 512), (8, 512))
"""Batch size and prompt length."""


def prefill_flops(model: PreTrainedModel, batch_size: int, prompt_len: int) -> int:
    """Floating-point operations of the matrix products of one prefill; a multiply-add counts two."""
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    )
    pairs = prompt_len * (prompt_len + 1) // 2
    heads_times_dim = sum(layer.self_attn.o_proj.in_features for layer in model.model.layers)
    per_sequence = 2 * linear * prompt_len + 2 * 2 * pairs * heads_times_dim + 2 * head.weight.numel()
    return batch_size * per_sequence


def main(
    ratio: Annotated[float, typer.Option(help="Fraction of decoder parameters removed.")] = 0.5,
    round_to: Annotated[int, typer.Option(help="MLP widths are multiples of this.")] = 64,
    repeats: Annotated[int, typer.Option(help="Runs of each model.")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print measured ratio, predicted ratio, and measured / predicted."""
    dense = AutoModelForCausalLM.from_pretrained(SHARED / "models" / "ref10m", dtype=torch.float32).eval()
    result = prune(dense, MagnitudeConfig(ratio, round_to=round_to))
    widths = {name: width for name, width in result.plan.widths.items() if name.startswith("layers.0.")}
    print(f"removed {result.plan.achieved['decoder']:.2%} of the decoder; layer 0: {widths}; {threads} threads")
    print("batch  prompt  dense ms  pruned ms  measured (quartiles)    predicted  measured/predicted")
    for batch_size, prompt_len in SETTINGS:
        found = compare_prefill(
            dense, result.model, prompt_len=prompt_len, batch_size=batch_size, repeats=repeats, num_threads=threads
        )
        predicted = prefill_flops(dense, batch_size, prompt_len) / prefill_flops(result.model, batch_size, prompt_len)
        low, _, high = quantiles([a / b for a, b in zip(found.a_s, found.b_s, strict=True)], n=4)
        dense_ms, pruned_ms = 1000 * median(found.a_s), 1000 * median(found.b_s)
        print(
            f"{batch_size:5} {prompt_len:7} {dense_ms:9.1f} {pruned_ms:10.1f} {found.ratio:9.2f} ({low:.2f}–{high:.2f})"
            f"{predicted:12.2f} {found.ratio / predicted:12.2f}"
        )


if __name__ == "__main__":
    typer.run(main)
