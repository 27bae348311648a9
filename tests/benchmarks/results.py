"""Perplexity of every method on the reference model: writes docs/results.json and the tables made from it.

    python tests/benchmarks/results.py --jobs 2     # measure what is missing, then write the tables
    python tests/benchmarks/results.py --tables-only

Protocol: ref10m, non-overlapping windows of 256 tokens, no BOS, float32, on the CPU. What is compared stands in
results_rows.py. Every result is written as soon as it is measured, so an interrupted run goes on; delete a row of
docs/results.json to measure it anew. Data and model are read from `HF_PRUNE_DATA` (default `../shared`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import torch
import transformers
import typer
from results_page import write_pages
from results_rows import CALIBRATION, CRITERIA_NAMES, RATIOS, SECTIONS, ZERO_SHOT, ZERO_SHOT_QUESTIONS
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_prune import LLMPrunerConfig, PruningConfig, PruningPlan, infer_structure
from hf_prune.data import load_text
from hf_prune.evaluation import num_bytes, num_parameters, perplexity, zero_shot
from hf_prune.pipeline import apply_and_repair, calibration_data, decide
from hf_prune.scores import METHODS, score

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("HF_PRUNE_DATA", ROOT.parent / "shared"))
RESULTS = ROOT / "docs" / "results.json"
KEPT = ROOT / "build" / "results"
REPAIR_FIELDS = ("repair", "repair_target", "repair_ridge")
NOVELS_CHARS = 400_000  # about 100,000 tokens

Cell = dict[str, Any]


@cache
def dense_model() -> tuple[PreTrainedModel, Any]:
    """The reference model and its tokenizer: loaded once by every process."""
    path = SHARED / "models" / "ref10m"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


@cache
def texts() -> dict[str, str]:
    """The two evaluation texts."""
    data = SHARED / "data"
    return {
        "wikitext2": load_text(data / "wikitext2" / "test.txt"),
        "novels": load_text(data / "prose" / "novels.txt", max_chars=NOVELS_CHARS),
    }


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
    """The result of one configuration."""
    pruned, plan = pruned_model(cell)
    return {"config": cell, "achieved": plan.achieved, "commit": commit(), **measure(pruned)}


def measure_zero_shot(cell: Cell | None) -> dict[str, Any]:
    """Accuracy on the question files, of one configuration or of the dense model."""
    model = dense_model()[0] if cell is None else pruned_model(cell)[0]
    files = SHARED / "data" / "zeroshot"
    found = zero_shot(model, dense_model()[1], [files], limit=ZERO_SHOT_QUESTIONS)
    return {"config": cell, "accuracy": {report.task: report.accuracy.value for report in found}}


def pruned_model(cell: Cell) -> tuple[PreTrainedModel, PruningPlan]:
    """The model and plan of a configuration. Scores and plans are kept: ratios share scores, repairs share plans."""
    dense, tokenizer = dense_model()
    config, structure = PruningConfig.from_dict(cell), infer_structure(dense)
    batches = calibration_data(config, tokenizer, str(SHARED / "data" / "wikitext2" / "train.txt"), 8)
    KEPT.mkdir(parents=True, exist_ok=True)
    scores_path, plan_path = KEPT / f"{scoring_key(config)}.safetensors", KEPT / f"{plan_key(config)}.json"
    if plan_path.exists():
        plan = dataclasses.replace(PruningPlan.load(plan_path), config=config)
    else:
        scores = load_file(scores_path) if scores_path.exists() else None
        plan, found = decide(dense, structure, config, batches, scores=scores)
        plan.save(plan_path)
        if scores is None:
            temporary = scores_path.with_suffix(f".{os.getpid()}")
            save_file(found, temporary)
            temporary.replace(scores_path)
    return apply_and_repair(dense, structure, plan, config, batches), plan


def plan_key(config: PruningConfig) -> str:
    """A name for everything that the plan depends on; a search, and several steps, look at what repair does."""
    irrelevant = () if config.allocation == "search" or config.num_steps > 1 else REPAIR_FIELDS
    return _key({name: value for name, value in config.to_dict().items() if name not in irrelevant})


def scoring_key(config: PruningConfig) -> str:
    """A name for everything that the scores of the dense model depend on."""
    irrelevant = {field.name for field in dataclasses.fields(PruningConfig)} - {"method", "seed", "axes"}
    if METHODS[config.method].needs_calibration:
        irrelevant -= {"num_samples", "seq_len"}
    if config.method == "policy_gradient":
        irrelevant -= {"pruning_ratio", "budget"}  # it learns the decision
    return _key({name: value for name, value in config.to_dict().items() if name not in irrelevant})


def _key(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def measure_rank_correlation() -> dict[str, dict[str, dict[str, float]]]:
    """Spearman correlation between LLM-Pruner's criteria: kind of axis → criterion → criterion → mean over the axes."""
    dense, tokenizer = dense_model()
    structure = infer_structure(dense)
    scores = {}
    for criterion in CRITERIA_NAMES:
        config = LLMPrunerConfig(0.5, criterion=criterion, **CALIBRATION)  # type: ignore[arg-type]
        train = str(SHARED / "data" / "wikitext2" / "train.txt")
        scores[criterion] = score(dense, structure, config, calibration_data(config, tokenizer, train, 8))
    return {
        kind: {
            first: {
                other: fmean(
                    float(spearmanr(scores[first][axis.name], scores[other][axis.name]).statistic)
                    for axis in structure.axes_of(kind)
                )
                for other in CRITERIA_NAMES
            }
            for first in CRITERIA_NAMES
        }
        for kind in ("mlp", "attention")
    }


def commit() -> str:
    """The state of the tree that a row was measured with."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def circumstances() -> dict[str, Any]:
    """Where and with what the numbers were made."""
    return {
        "model": "ref10m",
        "protocol": "windows of 256 tokens without overlap, no BOS, float32, exp(mean NLL of the predicted tokens)",
        "calibration": f"{CALIBRATION['num_samples']} × {CALIBRATION['seq_len']} tokens of wikitext2/train.txt, seed 0",
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


def missing(results: dict[str, Any], only: str, ratios: Sequence[float]) -> list[Cell]:
    """Configurations without a result, each once, of rows with `only` in "section: label"; 50 % first."""
    done = [row["config"] for row in results["rows"]]
    wanted: list[Cell] = []
    for ratio in sorted(ratios, key=lambda ratio: abs(ratio - 0.5)):
        for section in SECTIONS:
            for row in section.rows:
                if only.lower() not in f"{section.title}: {row.label}".lower():
                    continue
                wanted += [cell for cell in row.cells(ratio) if cell not in done and cell not in wanted]
    return wanted


def run(jobs: int, only: str, ratios: Sequence[float]) -> None:
    """Measure what docs/results.json does not hold yet, `jobs` at a time, one thread each."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {**circumstances(), "rows": []}
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running = [pool.submit(measure_pruned, cell) for cell in missing(results, only, ratios)]
        others = {} if "dense" in results else {pool.submit(measure_dense): "dense"}
        if "rank_correlation" not in results:
            others[pool.submit(measure_rank_correlation)] = "rank_correlation"
        known = [row["config"] for row in results.setdefault("zero_shot", [])]
        asked = [None, *(cell for row in ZERO_SHOT for ratio in row.ratios for cell in row.cells(ratio))]
        if only.lower() in "zero-shot":
            answered = [pool.submit(measure_zero_shot, cell) for cell in asked if cell not in known]
        else:
            answered = []
        for future in as_completed([*running, *others, *answered]):
            if future in answered:
                results["zero_shot"].append(future.result())
            elif future in others:
                results[others[future]] = future.result()
            else:
                results["rows"].append(future.result())
            save(results)
            print(future.result(), flush=True)


def main(
    jobs: Annotated[int, typer.Option(help="Processes, with one thread each.")] = 2,
    only: Annotated[str, typer.Option(help="Measure only rows whose section and label hold this.")] = "",
    ratio: Annotated[list[float] | None, typer.Option(help="Measure only at these ratios.")] = None,
    tables_only: Annotated[bool, typer.Option(help="Only write the tables from docs/results.json.")] = False,
) -> None:
    """Measure on ref10m and write the tables."""
    if not tables_only:
        run(jobs, only, ratio or RATIOS)
    write_pages(json.loads(RESULTS.read_text(encoding="utf-8")), ROOT)


if __name__ == "__main__":
    typer.run(main)
