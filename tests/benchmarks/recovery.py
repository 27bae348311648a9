"""Recovery after pruning on the reference model: writes docs/recovery.json and the table in docs/recovery.md.

    python tests/benchmarks/recovery.py                     # measure what is missing, then write the table
    python tests/benchmarks/recovery.py --training LoRA     # only this kind of training
    python tests/benchmarks/recovery.py --tables-only

ref10m, pruned and repaired by `OBSConfig(ratio)`, then trained for 300 steps of 16 × 256 tokens of WikiText-2 train:
the same windows in the same order for every run. The dense model is trained just so. Learning rates are chosen on the
first 100,000 characters of the validation text, by runs of 60 steps at 50 % (distillation takes that of all weights);
so is the best checkpoint of each run. Perplexity: windows of 256 without overlap, no BOS, float32. Every result is
written as soon as it is measured and every training run resumes from its last checkpoint, so an interrupted script
goes on. Data and model are read from `HF_PRUNE_DATA` (default `../shared`).
"""

import json
import os
import platform
import shutil
import time
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_prune import OBSConfig, PrunedModelForCausalLM, perplexity, prune, recover
from hf_prune.data import load_text
from hf_prune.report.tables import markdown_table

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("HF_PRUNE_DATA", ROOT.parent / "shared"))
RESULTS, PAGE = ROOT / "docs" / "recovery.json", ROOT / "docs" / "recovery.md"
TRAIN = SHARED / "data" / "wikitext2" / "train.txt"

STEPS, SHORT_STEPS, BATCH, SEQ_LEN = 300, 60, 16, 256
VALID_CHARS, NOVELS_CHARS = 100_000, 400_000
RATIOS = (0.5, 0.3)
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": True},
    "all weights": {"lora": False},
    "distillation": {"lora": False, "distil": True},
    "dense, all weights": {"lora": False},
}
CELLS = [(0.0, "none"), *((ratio, "none") for ratio in RATIOS)]
CELLS += [(ratio, kind) for kind in KINDS for ratio in ((0.0,) if kind.startswith("dense") else RATIOS)]
"""(pruning ratio, training)"""
RATES = {
    "LoRA": (1e-4, 1e-3, 3e-3),
    "all weights": (1e-4, 3e-4, 1e-3),
    "dense, all weights": (1e-4, 3e-4, 1e-3),
}
SAME_RATE = {"distillation": "all weights"}
"""Kinds that take the learning rate of another."""


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHARED / "models" / "ref10m")


def dense() -> PreTrainedModel:
    """A fresh copy: training changes it."""
    return AutoModelForCausalLM.from_pretrained(SHARED / "models" / "ref10m", dtype=torch.float32).eval()


def start(ratio: float, work: Path) -> PreTrainedModel:
    """The model that a run starts from, pruned once; ratio 0 is the dense one."""
    if ratio == 0:
        return dense()
    directory = work / f"start-{ratio}"
    if not directory.exists():
        config = OBSConfig(ratio)
        result = prune(dense(), config, tokenizer=tokenizer(), calibration=str(TRAIN), batch_size=4)
        PrunedModelForCausalLM.save_pretrained(result.model, directory, plan=result.plan)
    return PrunedModelForCausalLM.from_pretrained(directory).eval()


@cache
def texts() -> dict[str, str]:
    data = SHARED / "data"
    return {
        "wikitext2": load_text(data / "wikitext2" / "test.txt"),
        "novels": load_text(data / "prose" / "novels.txt", max_chars=NOVELS_CHARS),
    }


def measure(model: PreTrainedModel) -> dict[str, float]:
    """Perplexity on both corpora."""
    return {
        name: perplexity(model, tokenizer(), text, window=SEQ_LEN, batch_size=4, progress=False).perplexity
        for name, text in texts().items()
    }


def train(ratio: float, kind: dict[str, Any], rate: float, steps: int, work: Path) -> Any:
    """One training run, from its last checkpoint if it was interrupted."""
    valid = work / "valid.txt"
    if not valid.exists():
        work.mkdir(parents=True, exist_ok=True)
        valid.write_text(load_text(SHARED / "data" / "wikitext2" / "valid.txt", max_chars=VALID_CHARS))
    name = f"{ratio}-{'lora' if kind['lora'] else 'full'}-{'kd' if kind.get('distil') else 'lm'}"
    output = work / f"{name}-{rate}-{steps}"
    began = time.perf_counter()
    result = recover(
        start(ratio, work),
        output,
        train=str(TRAIN),
        eval=str(valid),
        tokenizer=tokenizer(),
        preset="lora" if kind["lora"] else "full",
        teacher=dense() if kind.get("distil") else None,
        steps=steps,
        seq_len=SEQ_LEN,
        resume=True,
        learning_rate=rate,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        save_steps=30,
        save_total_limit=1,
    )
    print(output.name, result.perplexity_before, "→", result.perplexity_after, f"{time.perf_counter() - began:.0f} s")
    for directory in (output, output.with_name(f"{output.name}-training")):
        shutil.rmtree(directory, ignore_errors=True)
    return result


def best_rate(training: str, results: dict[str, Any], work: Path) -> float:
    """The learning rate with the lowest validation perplexity after `SHORT_STEPS`."""
    training = SAME_RATE.get(training, training)
    tried = results.setdefault("tried", [])
    ratio = 0.0 if training.startswith("dense") else 0.5
    for rate in RATES[training]:
        if not any((t["training"], t["learning_rate"]) == (training, rate) for t in tried):
            found = train(ratio, KINDS[training], rate, SHORT_STEPS, work)
            tried.append({"training": training, "learning_rate": rate, "valid": found.perplexity_after})
            save(results)
    found = min((t for t in tried if t["training"] == training), key=lambda t: t["valid"])
    return float(found["learning_rate"])


def run(only: str, work: Path) -> None:
    """Measure every cell that docs/recovery.json does not hold yet."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {**circumstances(), "rows": []}
    done = {(row["pruning_ratio"], row["training"]) for row in results["rows"]}
    for ratio, training in CELLS:
        if (ratio, training) in done or only not in ("", training):
            continue
        row: dict[str, Any] = {"pruning_ratio": ratio, "training": training}
        if training == "none":
            model = start(ratio, work)
        else:
            rate = best_rate(training, results, work)
            began = time.perf_counter()
            found = train(ratio, KINDS[training], rate, STEPS, work)
            row |= {"learning_rate": rate, "train_s": time.perf_counter() - began, "valid": found.perplexity_after}
            model = found.model.eval()
        row |= {"num_parameters": model.num_parameters()} | measure(model)
        results["rows"].append(row)
        save(results)
        print(row, flush=True)


def circumstances() -> dict[str, Any]:
    return {
        "model": "ref10m",
        "training": f"{STEPS} steps of {BATCH} × {SEQ_LEN} tokens of wikitext2/train.txt, AdamW, linear decay",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()} CPU, one thread",
    }


def save(results: dict[str, Any]) -> None:
    """Write the results, by renaming: an interruption leaves the old file."""
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(RESULTS)


def write_table(results: dict[str, Any]) -> None:
    """Write the table between the markers of docs/recovery.md."""
    rows = sorted(results["rows"], key=lambda row: CELLS.index((row["pruning_ratio"], row["training"])))
    lines = [
        {
            "removed": f"{100 * row['pruning_ratio']:.0f} %",
            "training": row["training"].removeprefix("dense, "),
            "learning rate": f"{row['learning_rate']:g}" if "learning_rate" in row else "",
            "parameters": f"{row['num_parameters']:,}",
            "WikiText-2 test": f"{row['wikitext2']:.2f}",
            "novels": f"{row['novels']:.2f}",
        }
        for row in sorted(rows, key=lambda row: row["pruning_ratio"])
    ]
    before, rest = PAGE.read_text().split("<!-- results -->", 1)
    after = rest.split("<!-- /results -->", 1)[1]
    PAGE.write_text(f"{before}<!-- results -->\n{markdown_table(lines)}<!-- /results -->{after}")


def main(
    training: Annotated[str, typer.Option(help="Only this kind: LoRA, all weights, …")] = "",
    work: Annotated[Path, typer.Option(help="Where runs keep their checkpoints.")] = ROOT / "build" / "recovery",
    tables_only: Annotated[bool, typer.Option(help="Only write the table from docs/recovery.json.")] = False,
) -> None:
    """Measure recovery on ref10m and write the table."""
    torch.set_num_threads(1)
    if not tables_only:
        run(training, work)
    write_table(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    typer.run(main)
