"""KV groups or query heads: perplexity where as much of the attention goes one way, the other, or both.

    OMP_NUM_THREADS=1 HF_PRUNE_DATA=../shared python tests/benchmarks/heads.py

Only attention is pruned, `--fraction` of its parameters. The rows print as a Markdown table.
"""

import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import LLMPrunerConfig, MagnitudeConfig, OBSConfig, infer_structure, perplexity, prune

KINDS = (("attention",), ("query_heads",), ("attention", "query_heads"))


def main(
    fractions: Annotated[list[float], typer.Option("--fraction", help="Of the attention's parameters.")] = [0.25],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Calibration windows of 256 tokens.")] = 128,
    windows: Annotated[int, typer.Option(help="Of each text that perplexity is measured on.")] = 100,
    only: Annotated[str, typer.Option(help="Only the methods whose name holds this.")] = "",
) -> None:
    """Print one row per fraction, method and kind of axes."""
    shared = Path(os.environ.get("HF_PRUNE_DATA", "../shared"))
    path = str(shared / "models" / "ref10m")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    structure = infer_structure(model)
    counted = structure.counted("decoder")
    attention = sum(structure.numel(name) for name in counted if structure.owners[name].branch == "attention")
    share = attention / structure.num_parameters(budget="decoder")
    texts = {
        name: (shared / "data" / file).read_text(encoding="utf-8")[: 2000 * windows]
        for name, file in (("WikiText-2 test", "wikitext2/test.txt"), ("novels", "prose/novels.txt"))
    }

    def row(*cells: object) -> None:
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)

    def measured(one: torch.nn.Module) -> list[str]:
        return [
            f"{perplexity(one, tokenizer, text, max_windows=windows, progress=False).perplexity:.2f}"
            for text in texts.values()
        ]

    row("removed", "method", "axes", "achieved", *texts, "seconds")
    row("dense", "", "", "", *measured(model), "")
    for fraction in fractions:
        for method, kind, settings in (
            ("magnitude", MagnitudeConfig, {"allocation": "global"}),
            ("llm_pruner", LLMPrunerConfig, {}),
            ("llm_pruner, selection and repair", LLMPrunerConfig, {"selection": "obs", "repair": "least_squares"}),
            ("obs, repair", OBSConfig, {}),
        ):
            for axes in KINDS if only in method else ():
                config = kind(fraction * share, axes=axes, num_samples=samples, **settings)
                start = time.process_time()
                text = str(shared / "data" / "wikitext2" / "train.txt")
                found = prune(model, config, tokenizer=tokenizer, calibration=text)
                seconds = time.process_time() - start
                achieved = found.plan.achieved["decoder"] / share
                row(
                    f"{100 * fraction:g} %",
                    method,
                    ", ".join(axes),
                    f"{100 * achieved:.1f} %",
                    *measured(found.model),
                    f"{seconds:.0f}",
                )


if __name__ == "__main__":
    typer.run(main)
