"""Cost of LLM-Pruner scores: time against a plain forward and backward pass, peak memory against the weights.

    python tests/benchmarks/scoring.py time                  # ratios, interleaved in one run
    python tests/benchmarks/scoring.py memory                # 1.1B-shaped random Llama in bfloat16

The baseline of the time is what any gradient needs: forward and backward, gradients of all scored parameters kept.
Memory is the peak resident size above what the process held before scoring, weights included.
"""

import resource
import statistics
import time
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_prune import LLMPrunerConfig, Structure, infer_structure
from hf_prune.scores import score

app = typer.Typer(add_completion=False)
CRITERIA = ("vector", "first_order", "fisher")


def random_llama(dtype: torch.dtype, **sizes: int) -> PreTrainedModel:
    """A Llama of these sizes with random weights."""
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=dtype).eval()


def plain(model: PreTrainedModel, structure: Structure, ids: torch.Tensor) -> None:
    """Forward and backward, gradients for the parameters that scores need."""
    wanted = {m.parameter for axis, members in structure.members.items() if axis != "hidden" for m in members}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        parameter.grad = None
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@app.command("time")
def measure_time(
    hidden: int = 1024, layers: int = 8, tokens: int = 64, samples: int = 10, repeats: int = 7, threads: int = 1
) -> None:
    """Wall time of scoring one batch, as a ratio to the plain pass of the same batch."""
    torch.set_num_threads(threads)
    model = random_llama(
        torch.float32,
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
    )
    structure = infer_structure(model)
    ids = torch.randint(0, 8192, (samples, tokens), generator=torch.Generator().manual_seed(0))
    runs: dict[str, Any] = {"plain": lambda: plain(model, structure, ids)}
    for criterion in CRITERIA:
        config = LLMPrunerConfig(0.5, criterion=criterion)
        runs[criterion] = lambda config=config: score(model, structure, config, [{"input_ids": ids}])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["plain"])
    for name, values in seconds.items():
        print(f"{name:12} {statistics.median(values):8.2f} s   ratio {statistics.median(values) / base:.3f}")


@app.command("memory")
def measure_memory(
    criterion: Annotated[str, typer.Argument()] = "first_order", layers: int = 22, tokens: int = 64, samples: int = 1
) -> None:
    """Peak resident memory of scoring, of a model shaped like TinyLlama 1.1B, with gradient checkpointing."""
    model = random_llama(
        torch.bfloat16,
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    structure = infer_structure(model)
    model.gradient_checkpointing_enable()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    ids = torch.randint(0, 32000, (samples, tokens), generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start = time.perf_counter()
    score(model, structure, LLMPrunerConfig(0.5, criterion=criterion), [{"input_ids": ids}])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{criterion}: weights {weights:.2f} GiB, resident before {before:.2f} GiB, peak {peak:.2f} GiB, "
        f"peak / weights {peak / weights:.2f}; all gradients would add {weights:.2f} GiB; "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    app()
