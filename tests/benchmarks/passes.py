"""Time of every method and of repair, as a multiple of a plain forward pass over the same calibration tokens.

    OMP_NUM_THREADS=1 python tests/benchmarks/passes.py                              # ref10m, 64 × 256 tokens
    OMP_NUM_THREADS=1 python tests/benchmarks/passes.py --model llama --samples 8    # two TinyLlama-shaped layers
    OMP_NUM_THREADS=1 python tests/benchmarks/passes.py --only obs --only repair --out passes.json

CPU seconds of the process with one thread, the least of several repeats. A plain pass runs before each run of a method,
and a method is compared with its own ones: other load on the machine then slows both. Only `score`, `apply_plan` and
`repair_` are called. Methods that learn: one episode of PruneNet, and one step of the policy gradient (half of what
four steps take above two).
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_prune import (
    LLMPrunerConfig,
    MagnitudeConfig,
    OBSConfig,
    PolicyGradientConfig,
    PruneNetConfig,
    PruningConfig,
    RandomConfig,
    WandaConfig,
    allocate,
    apply_plan,
    infer_structure,
)
from hf_prune.repair import repair_
from hf_prune.scores import score

SHARED = Path(os.environ.get("HF_PRUNE_DATA", Path(__file__).parents[3] / "shared"))
CRITERIA = ("fisher", "first_order", "vector", "second_order")
STEPS = (2, 4)


def methods(seq_len: int, num_samples: int) -> dict[str, PruningConfig]:
    """Name in the table → settings."""
    learned: dict[str, Any] = {"seq_len": seq_len, "num_samples": num_samples, "init": "random"}
    return {
        "random": RandomConfig(0.5),
        "magnitude": MagnitudeConfig(0.5),
        "wanda": WandaConfig(0.5),
        **{f"llm_pruner, {name}": LLMPrunerConfig(0.5, criterion=name) for name in CRITERIA},  # type: ignore[arg-type]
        "obs": OBSConfig(0.5),
        "prunenet, 1 episode": PruneNetConfig(0.5, num_episodes=1),
        **{
            f"policy_gradient, {steps} steps": PolicyGradientConfig(0.5, policy_steps=steps, **learned)
            for steps in STEPS
        },
    }


def load(model: str, dtype: torch.dtype, sizes: dict[str, int]) -> PreTrainedModel:
    """A checkpoint, or for `llama` a random one of these sizes."""
    if model == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype).eval()
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()


def seconds_of(run: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main(
    model: Annotated[str, typer.Option(help="A checkpoint, or `llama` for random weights.")] = str(
        SHARED / "models" / "ref10m"
    ),
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens of each window.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Windows of each batch.")] = 8,
    repeats: Annotated[int, typer.Option(help="The least of so many counts.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose names start so; default: all.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    vocab: Annotated[int, typer.Option(help="These sizes are those of `llama`.")] = 2000,
    hidden: int = 2048,
    intermediate: int = 5632,
    layers: int = 2,
    heads: int = 32,
    kv_heads: int = 4,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    dense = load(model, getattr(torch, dtype), sizes)
    structure = infer_structure(dense)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, dense.config.vocab_size, (samples, tokens), generator=draw).split(batch_size)
    batches = [{"input_ids": part} for part in ids]
    plan = allocate(score(dense, structure, RandomConfig(0.5)), structure, RandomConfig(0.5))

    def forward() -> None:
        with torch.no_grad():
            for part in ids:
                dense(input_ids=part, use_cache=False)

    def repair() -> float:
        pruned = apply_plan(dense, structure, plan)
        return seconds_of(lambda: repair_(pruned, dense, structure, plan, batches))

    runs: dict[str, Callable[[], float]] = {
        name: lambda config=config: seconds_of(lambda: score(dense, structure, config, batches))  # type: ignore[misc]
        for name, config in methods(tokens, samples).items()
    }
    runs["repair, 50 %"] = repair
    runs = {name: run for name, run in runs.items() if not only or name.startswith(tuple(only))}
    forward()
    passes: dict[str, list[float]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            passes[name].append(seconds_of(forward))
            seconds[name].append(run())
    rows = {name: (min(values), min(passes[name])) for name, values in seconds.items()}
    few, more = (f"policy_gradient, {steps} steps" for steps in STEPS)
    if few in rows:
        (start, base), (end, other) = rows.pop(few), rows.pop(more)
        rows["policy_gradient, 1 step"] = (end - start) / (STEPS[1] - STEPS[0]), min(base, other)
    found = {
        "model": Path(model).name if model != "llama" else sizes,
        "tokens": [samples, tokens, batch_size],
        "dtype": dtype,
        "threads": threads,
        "repeats": repeats,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "forward_s": {name: round(base, 3) for name, (_, base) in rows.items()},
        "seconds": {name: round(value, 3) for name, (value, _) in rows.items()},
        "passes": {name: round(value / base, 2) for name, (value, base) in rows.items()},
    }
    typer.echo("| method | seconds | forward pass | ratio |\n| --- | ---: | ---: | ---: |")
    for name, (value, base) in rows.items():
        typer.echo(f"| {name} | {value:.2f} | {base:.2f} | {value / base:.2f} |")
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
