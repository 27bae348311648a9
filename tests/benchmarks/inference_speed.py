"""Wall time and memory of `infer_structure` on large Llamas, beside building the model on the meta device alone.

    python tests/benchmarks/inference_speed.py

No weights are allocated: a 70B model in 16 bits is 140 GB. Times are the best of three, on one thread; processor time
is what counts on a machine with other work.
"""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig
from transformers.utils import logging

from hf_prune.structure.building import build_empty
from hf_prune.structure.inference import infer_structure, traceable_config

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {
    "7B": {},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
REPEATS = 3


def best_time_s(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of the fastest of `REPEATS` runs."""
    times = []
    for _ in range(REPEATS):
        wall, processor = time.perf_counter(), time.process_time()
        work()
        times.append((time.perf_counter() - wall, time.process_time() - processor))
    return min(times)


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    infer_structure(LlamaConfig(num_hidden_layers=1))  # imports and caches
    print("                                  build (wall, CPU)  infer (wall, CPU)")
    print("model       parameters  axes       s       s         s       s    peak memory +MB")
    for name, values in SIZES.items():
        config = LlamaConfig(**values)
        before = peak_mb()
        structure = infer_structure(config)
        grown = peak_mb() - before
        build = best_time_s(lambda config=config: build_empty(traceable_config(config)))
        infer = best_time_s(lambda config=config: infer_structure(config))
        parameters, axes = structure.num_parameters(), len(structure.axes)
        times = "   ".join(f"{wall:7.2f} {processor:7.2f}" for wall, processor in (build, infer))
        print(f"{name:6} {parameters:15,} {axes:5} {times} {grown:18.0f}")


if __name__ == "__main__":
    main()
