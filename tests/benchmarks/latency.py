"""Predicted against measured latency, for plans of the reference model and of a wider random Llama.

    OMP_NUM_THREADS=1 python tests/benchmarks/latency.py

Measures the table of each model, then each plan against the dense model in turns: prefill by the fastest round,
decoding by the median token, as in the table. Prints what is saved, predicted and measured, and predicted / measured
time. Reads ref10m from `HF_PRUNE_DATA` (default `../shared`). Nothing else should run meanwhile.
"""

import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_prune import MagnitudeConfig, PruningConfig, RandomConfig, infer_structure, measure_latency, prune
from hf_prune.evaluation import speed
from hf_prune.evaluation.latency import compare_requests

SHARED = Path(os.environ.get("HF_PRUNE_DATA", Path(__file__).parents[3] / "shared"))


def wide_llama(layers: int) -> PreTrainedModel:
    """A random Llama of hidden size 1024, 16 query heads on 4 KV groups, 2816 MLP channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def plans() -> dict[str, PruningConfig]:
    """What is compared: widths alike and not, attention or MLP only, whole layers, a budget of time."""
    return {
        "30 % uniform": MagnitudeConfig(0.3),
        "50 % uniform": MagnitudeConfig(0.5),
        "50 % global": MagnitudeConfig(0.5, allocation="global"),
        "40 % MLP only": MagnitudeConfig(0.4, axes=("mlp",), round_to=32),
        "10 % attention only": MagnitudeConfig(0.1, axes=("attention",)),
        "25 % whole layers": RandomConfig(0.25, axes=("layer",)),
        "30 % of latency": MagnitudeConfig(0.3, budget="latency"),
        "30 % of latency, global": MagnitudeConfig(0.3, budget="latency", allocation="global"),
    }


def compare(name: str, model: PreTrainedModel, repeats: int, prompt_len: int, new_tokens: int) -> None:
    """Print the table's predictions for one model."""
    structure = infer_structure(model)
    start = time.perf_counter()
    table = measure_latency(model, structure, prompt_len=prompt_len, new_tokens=new_tokens, repeats=repeats)
    print(f"\n{name}: prompt {prompt_len}, {new_tokens} new tokens; table in {time.perf_counter() - start:.0f} s")
    print(f"{'plan':26} saved: predicted  measured   predicted/measured: prefill  decode  total")
    for title, config in plans().items():
        result = prune(model, config, latency=table)
        before, parts = compare_requests(model, result.model, prompt_len, new_tokens, 1, repeats=repeats)
        predicted, dense = table.predict_plan(result.plan), table.predict({})
        total = (before[0] * parts[0] + before[1] * parts[1]) / sum(before)
        # relative to the dense model, so that a machine that has become slower since does not count
        ratios = (predicted.prefill_s / dense.prefill_s / parts[0], predicted.decode_s / dense.decode_s / parts[1])
        ratio = predicted.total_s / dense.total_s / total
        print(
            f"{title:26} {1 - predicted.total_s / dense.total_s:16.1%} {1 - total:9.1%} "
            f"{ratios[0]:27.2f} {ratios[1]:7.2f} {ratio:6.2f}",
            flush=True,
        )


def main(
    repeats: Annotated[int, typer.Option(help="Rounds of each pair.")] = 10,
    prompt_len: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after it.")] = 16,
    layers: Annotated[int, typer.Option(help="Layers of the wide model.")] = 4,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="CPU seconds of the thread: for a busy machine.")
    ] = False,
) -> None:
    """Print predicted and measured latency."""
    torch.set_num_threads(1)
    if cpu_time:
        speed._now = lambda _: time.thread_time()
    dense = AutoModelForCausalLM.from_pretrained(SHARED / "models" / "ref10m", dtype=torch.float32).eval()
    compare("ref10m", dense, repeats, prompt_len, new_tokens)
    compare("wide random Llama", wide_llama(layers), repeats, prompt_len, new_tokens)


if __name__ == "__main__":
    typer.run(main)
