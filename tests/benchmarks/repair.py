"""Time and memory of repair, against plain forward passes of the same calibration batches.

    OMP_NUM_THREADS=1 python tests/benchmarks/repair.py                  # 2 layers shaped like TinyLlama 1.1B
    OMP_NUM_THREADS=1 python tests/benchmarks/repair.py --layers 22      # the whole model

The baseline is the dense decoder without the output layer, so that few layers give the ratio of many: every layer is
repaired the same way. Times are CPU seconds of the process (with one thread: what other load on the machine does not
change) and wall seconds. Memory is the peak resident size above what the process held before, for each of the two.
"""

import resource
import time
from typing import Annotated, Any

import psutil
import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_prune import RandomConfig, allocate, apply_plan, infer_structure
from hf_prune.repair import repair_
from hf_prune.scores import score


def peak_gib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def resident_gib() -> float:
    """Resident size of this process now."""
    return psutil.Process().memory_info().rss / 2**30


def main(
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 2,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens of each window.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Windows of each batch.")] = 8,
    ratios: Annotated[list[float], typer.Option("--ratio", help="Fraction of decoder parameters removed.")] = [0.5],  # noqa: B006
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print seconds, the ratio to the forward passes, and memory."""
    torch.set_num_threads(threads)
    sizes: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32).eval()
    structure = infer_structure(model)
    ids = torch.randint(0, 32000, (samples, tokens), generator=torch.Generator().manual_seed(0)).split(batch_size)
    batches = [{"input_ids": part} for part in ids]
    held = resident_gib()
    with torch.no_grad():
        model.model(input_ids=ids[0], use_cache=False)  # warm up
        seconds, wall = time.process_time(), time.perf_counter()
        for part in ids:
            model.model(input_ids=part, use_cache=False)
    forward, wall = time.process_time() - seconds, time.perf_counter() - wall
    print(f"{layers} layers, {samples} × {tokens} tokens, model and process: {held:.2f} GiB")
    print(f"forward passes: {forward:.1f} s ({wall:.1f} s wall), peak {peak_gib() - held:.2f} GiB above", flush=True)
    for ratio in ratios:
        config = RandomConfig(ratio)
        plan = allocate(score(model, structure, config), structure, config)
        pruned = apply_plan(model, structure, plan)
        held = resident_gib()
        seconds, wall = time.process_time(), time.perf_counter()
        repair_(pruned, model, structure, plan, batches)
        seconds, wall = time.process_time() - seconds, time.perf_counter() - wall
        print(
            f"repair at {100 * ratio:.0f} %: {seconds:.1f} s ({wall:.1f} s wall), ratio {seconds / forward:.2f}",
            end="; ",
        )
        print(f"peak {peak_gib() - held:.2f} GiB above both models", flush=True)


if __name__ == "__main__":
    typer.run(main)
