"""Processor seconds of `infer_structure` and `pruned_config` on two large shapes, and how they grow with the layers.

    python tests/benchmarks/inference_speed.py --out inference_speed.json

Shapes: Llama-3 70B and DeepSeek-V3 671B, no weights. Plans come from random scores: `uniform` allocation gives all
layers one width, `global` allocation each its own; `further`: of a structure that plans were made for before. Times are
the best of three, on one thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import DeepseekV3Config, LlamaConfig
from transformers.utils import logging

from hf_prune.allocation import allocate
from hf_prune.config import RandomConfig
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruned_config import pruned_config

if TYPE_CHECKING:
    from collections.abc import Callable

LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
DEEPSEEK = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
SHAPES = {"llama_70b": (LlamaConfig, LLAMA, (20, 40, 80)), "deepseek_v3": (DeepseekV3Config, DEEPSEEK, (16, 31, 61))}
RATIO, REPEATS = 0.3, 3


def best_s(work: Callable[[], Any]) -> float:
    """Processor seconds of the fastest of `REPEATS` runs."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return round(min(times), 3)


def measure(config: Any) -> dict[str, float]:
    """Seconds of the inference, of the config of a plan for each allocation, and of both together."""
    structure = infer_structure(config)
    draw = torch.Generator().manual_seed(0)
    scores = {
        axis.name: torch.rand(axis.num_units, generator=draw)
        for kind in ("attention", "mlp")
        for axis in structure.axes_of(kind)
        if axis.prunable
    }
    found: dict[str, float] = {
        "parameters": structure.num_parameters(),
        "axes": len(structure.axes),
        "infer_s": best_s(lambda: infer_structure(config)),
    }
    for allocation in ("uniform", "global"):
        plan = allocate(scores, structure, RandomConfig(RATIO, allocation=allocation))
        first = lambda plan=plan: pruned_config(config, replace(structure, _known={}), plan)  # noqa: E731
        found[f"{allocation}_config_s"] = best_s(first)
        found[f"{allocation}_further_s"] = best_s(lambda plan=plan: pruned_config(config, structure, plan))
        found[f"{allocation}_total_s"] = round(found["infer_s"] + found[f"{allocation}_config_s"], 3)
    return found


def main() -> None:
    """Measure and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    infer_structure(LlamaConfig(num_hidden_layers=1))  # imports and caches
    result: dict[str, Any] = {"torch": torch.__version__, "pruning_ratio": RATIO, "repeats": REPEATS, "shapes": {}}
    for name, (cls, values, layers) in SHAPES.items():
        result["shapes"][name] = {n: measure(cls(**{**values, "num_hidden_layers": n})) for n in layers}
    result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
