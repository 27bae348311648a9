"""Throughput of masked and sliced forward passes, as ratios to plain dense passes of the same tokens in the same run.

    python tests/benchmarks/masked_forward.py                     # ref10m's shape, and a larger one
    python tests/benchmarks/masked_forward.py --hidden 1024 --layers 4

Masked: every row has a mask of its own. Sliced: MLP weights are sliced for one mask and serve all windows. Half of the
units of every axis are kept. Times include what a step of learning adds: setting masks, losses in float32. The dense
baseline computes the same losses. Median over repeats that take turns.
"""

import statistics
import time
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_prune import PolicyGradientConfig, infer_structure
from hf_prune.layers.walk import Walk
from hf_prune.scores.policy_gradient.forward import open_model
from hf_prune.scores.policy_gradient.policy import find_units


def measure(hidden: int, layers: int, vocab: int, windows: int, tokens: int, repeats: int, device: str) -> None:
    """Print one line for each way."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shape = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64, "head_dim": 32}
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, **shape
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    structure = infer_structure(model)
    units = find_units(structure, PolicyGradientConfig(0.5), torch.device(device))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (windows, tokens), generator=generator)
    masks = (torch.rand(windows, 1, len(units.costs), generator=generator) < 0.5).to(device)

    def dense() -> Any:
        with torch.no_grad():
            rows = ids.to(device)
            logits = model(input_ids=rows, use_cache=False).logits
            return [F.cross_entropy(row[:-1].float(), own[1:]) for row, own in zip(logits, rows, strict=True)]

    def masked() -> Any:
        with open_model(Walk(model, structure.layer_paths), structure, units, forward_rows=windows) as run:
            return run.losses(ids, masks, 1)

    def sliced() -> Any:
        with open_model(
            Walk(model, structure.layer_paths), structure, units, forward_rows=windows, sliced_forward=True
        ) as run:
            return run.losses(ids, masks[:1], windows)

    ways = {"dense": dense, "masked": masked, "sliced": sliced}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["dense"])
    print(f"hidden {hidden}, {layers} layers, vocabulary {vocab}, {windows} × {tokens} tokens, {dtype}, {device}")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"  {name:7} {windows * tokens / middle:10,.0f} tokens/s   {base / middle:.3f} of dense", flush=True)


def main(
    hidden: Annotated[int, typer.Option(help="Hidden size; 0: several shapes.")] = 0,
    layers: int = 4,
    vocab: int = 8192,
    windows: int = 8,
    tokens: int = 128,
    repeats: int = 5,
    device: str = "cpu",
    threads: int = 1,
) -> None:
    """Measure."""
    torch.set_num_threads(threads)
    for size, depth in ((hidden, layers),) if hidden else ((256, 8), (512, 4), (1024, 4)):
        measure(size, depth, vocab, windows, tokens, repeats, device)


if __name__ == "__main__":
    typer.run(main)
