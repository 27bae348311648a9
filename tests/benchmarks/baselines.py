"""Perplexity of the baselines on the reference model: writes docs/baselines.json and the tables made from it.

    python tests/benchmarks/baselines.py --jobs 2     # measure what is missing, then write the tables
    python tests/benchmarks/baselines.py --tables-only

Protocol: ref10m, non-overlapping windows of 256 tokens, no BOS, float32, on the CPU. Every result is written as soon as
it is measured, so an interrupted run goes on; delete docs/baselines.json to measure anew. Data and model are read from
`HF_PRUNE_DATA` (default `../shared`).
"""

import json
import os
import platform
import subprocess
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_prune import PruningConfig, Structure, allocate, apply_plan, infer_structure
from hf_prune.data import load_text
from hf_prune.evaluation import markdown_table, num_bytes, num_parameters, perplexity
from hf_prune.methods import score
from hf_prune.pipeline import calibration_data

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("HF_PRUNE_DATA", ROOT.parent / "shared"))
RESULTS = ROOT / "docs" / "baselines.json"

RATIOS = (0.2, 0.3, 0.5, 0.7)
ALLOCATIONS = ("uniform", "global")
SEEDS = {"llm_pruner": (0,), "wanda": (0,), "magnitude": (0,), "random": (0, 1, 2)}
Cell = tuple[str, str, float, int]
CELLS: list[Cell] = [
    (method, allocation, ratio, seed)
    for ratio in RATIOS
    for method, seeds in SEEDS.items()
    for seed in seeds
    for allocation in ALLOCATIONS
    if (method, allocation)
    != ("random", "global")  # random scores per parameter strip attention: perplexity in thousands
]
NOVELS_CHARS = 400_000  # about 100,000 tokens
CORPORA = {"wikitext2": "WikiText-2 test", "novels": "novels (first 400,000 characters; part of the training data)"}
CALIBRATION = {"num_samples": 128, "seq_len": 256}
KEY = ("method", "allocation", "pruning_ratio", "seed")


@cache
def dense_model() -> tuple[PreTrainedModel, Any, Structure]:
    """The reference model, its tokenizer and its structure: loaded once by every process."""
    path = SHARED / "models" / "ref10m"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path), infer_structure(model)


@cache
def texts() -> dict[str, str]:
    """The two evaluation texts."""
    data = SHARED / "data"
    return {
        "wikitext2": load_text(data / "wikitext2" / "test.txt"),
        "novels": load_text(data / "prose" / "novels.txt", max_chars=NOVELS_CHARS),
    }


@cache
def scores_of(method: str, seed: int) -> dict[str, torch.Tensor]:
    """Scores do not depend on the ratio."""
    dense, tokenizer, structure = dense_model()
    config = PruningConfig.from_dict({"method": method, "pruning_ratio": 0.5, "seed": seed, **CALIBRATION})
    train = str(SHARED / "data" / "wikitext2" / "train.txt")
    batches = calibration_data(config, tokenizer, train, batch_size=4)
    return score(dense, structure, config, batches=batches)


def measure(model: PreTrainedModel) -> dict[str, Any]:
    """Size and perplexities of one model."""
    tokenizer = dense_model()[1]
    found: dict[str, Any] = {"num_parameters": num_parameters(model), "num_bytes": num_bytes(model)}
    for name, text in texts().items():
        report = perplexity(model, tokenizer, text, window=256, batch_size=4, progress=False)
        found[name] = {"perplexity": report.perplexity, "num_tokens": report.num_tokens}
    return found


def measure_dense() -> dict[str, Any]:
    """The row of the dense model."""
    return measure(dense_model()[0])


def measure_pruned(cell: Cell) -> dict[str, Any]:
    """The row of one method, allocation, ratio and seed."""
    values = dict(zip(KEY, cell, strict=True))
    config = PruningConfig.from_dict(values | CALIBRATION)
    dense, _, structure = dense_model()
    plan = allocate(scores_of(config.method, config.seed), structure, config)
    return values | {"achieved": plan.achieved} | measure(apply_plan(dense, structure, plan))


def circumstances() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "model": "ref10m",
        "protocol": "windows of 256 tokens without overlap, no BOS, float32, exp(mean NLL of the predicted tokens)",
        "calibration": f"{CALIBRATION['num_samples']} × {CALIBRATION['seq_len']} tokens of wikitext2/train.txt, seed 0",
        "commit": git.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()} CPU, one thread per run",
    }


def save(results: dict[str, Any]) -> None:
    """Write the results, by renaming: an interruption leaves the old file."""
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def run(jobs: int) -> None:
    """Measure every combination that docs/baselines.json does not hold yet, `jobs` at a time, one thread each."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {**circumstances(), "rows": []}
    done = {tuple(row[name] for name in KEY) for row in results["rows"]}
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        dense = None if "dense" in results else pool.submit(measure_dense)
        running = [pool.submit(measure_pruned, cell) for cell in CELLS if cell not in done]
        for future in as_completed([*running, *([dense] if dense else [])]):
            if future is dense:
                results["dense"] = future.result()
            else:
                results["rows"].append(future.result())
            save(results)
            print(future.result(), flush=True)


def table(results: dict[str, Any], corpus: str) -> str:
    """One line per method and allocation, one column per ratio."""
    lines = [{"method": "dense", "allocation": "", "0 %": f"{results['dense'][corpus]['perplexity']:.2f}"}]
    for method in ("random", "magnitude", "wanda", "llm_pruner"):
        for allocation in ALLOCATIONS:
            if (method, allocation) == ("random", "global"):
                continue
            line = {"method": method, "allocation": allocation, "0 %": ""}
            for ratio in RATIOS:
                found = [
                    row[corpus]["perplexity"]
                    for row in results["rows"]
                    if (row["method"], row["allocation"], row["pruning_ratio"]) == (method, allocation, ratio)
                ]
                line[f"{100 * ratio:.0f} %"] = _cell(found)
            lines.append(line)
    return markdown_table([{column: line.get(column, "") for column in lines[-1]} for line in lines])


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    mean = f"{fmean(values):,.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):,.4g}–{max(values):,.4g})"


def achieved_line(results: dict[str, Any]) -> str:
    """The largest difference between the asked and the achieved ratio."""
    rows = results["rows"]
    worst = max(abs(row["achieved"]["decoder"] - row["pruning_ratio"]) / row["pruning_ratio"] for row in rows)
    absolute = max(abs(row["achieved"]["decoder"] - row["pruning_ratio"]) for row in rows)
    return (
        f"Over these {len(rows)} runs the achieved ratio differs from the asked one by at most {100 * absolute:.3f} "
        f"percentage points ({100 * worst:.2f} % of it)."
    )


def write_tables(results: dict[str, Any]) -> None:
    """Write docs/results.md, and the short table between the markers of README.md."""
    seeds = "random: mean of the seeds 0, 1, 2 (smallest–largest)."
    short = "\n".join([table(results, "wikitext2"), achieved_line(results)])
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split("<!-- results -->", 1)
    _, after = rest.split("<!-- /results -->", 1)
    readme.write_text(f"{before}<!-- results -->\n{short}\n<!-- /results -->{after}", encoding="utf-8")

    facts = [f"- {name}: {value}" for name, value in results.items() if name not in ("dense", "rows")]
    parts = ["# Results", "Made by `tests/benchmarks/baselines.py`; the numbers are in `docs/baselines.json`."]
    parts += ["\n".join(facts), f"Columns: fraction of decoder parameters removed; {seeds} Nothing was retrained."]
    for corpus, title in CORPORA.items():
        parts += [f"## Perplexity on {title}", table(results, corpus).rstrip()]
    parts += ["## Asked and achieved", achieved_line(results), sizes(results).rstrip()]
    (ROOT / "docs" / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def sizes(results: dict[str, Any]) -> str:
    """Every run: asked, achieved in all meanings, parameters."""
    lines = [
        {
            "method": f"{row['method']} (seed {row['seed']})" if row["method"] == "random" else row["method"],
            "allocation": row["allocation"],
            "asked": f"{100 * row['pruning_ratio']:.0f} %",
            **{name: f"{100 * row['achieved'][name]:.3f} %" for name in ("decoder", "model", "units")},
            "parameters": f"{row['num_parameters']:,}",
        }
        for row in sorted(results["rows"], key=lambda row: tuple(row[name] for name in KEY))
    ]
    return markdown_table(lines)


def main(
    jobs: Annotated[int, typer.Option(help="Processes, with one thread each.")] = 2,
    tables_only: Annotated[bool, typer.Option(help="Only write the tables from docs/baselines.json.")] = False,
) -> None:
    """Measure the baselines on ref10m and write the tables."""
    if not tables_only:
        run(jobs)
    write_tables(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    typer.run(main)
