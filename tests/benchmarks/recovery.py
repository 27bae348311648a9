"""Recovery after pruning on the reference model: writes docs/recovery.json and the table in docs/recovery.md.

    python tests/benchmarks/recovery.py                            # measure what is missing, then write the table
    python tests/benchmarks/recovery.py --repair least_squares     # the same after repair
    python tests/benchmarks/recovery.py --tables-only

ref10m, pruned by `LLMPrunerConfig(ratio)` with its defaults, then trained for 300 steps of 16 × 256 tokens of
WikiText-2 train: the same windows in the same order for every run. Learning rates are chosen on the first 100,000
characters of the validation text, by runs of 60 steps at 50 %; so is the best checkpoint of each run. Perplexity:
windows of 256 without overlap, no BOS, float32. Every result is written as soon as it is measured and every training
run resumes from its last checkpoint, so an interrupted script goes on. Data and model are read from `HF_PRUNE_DATA`
(default `../shared`).
"""

import dataclasses
import itertools
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

from hf_prune import LLMPrunerConfig, PrunedModelForCausalLM, perplexity, prune, recover
from hf_prune.data import load_text
from hf_prune.evaluation import markdown_table

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("HF_PRUNE_DATA", ROOT.parent / "shared"))
RESULTS, PAGE = ROOT / "docs" / "recovery.json", ROOT / "docs" / "recovery.md"
TRAIN = SHARED / "data" / "wikitext2" / "train.txt"

STEPS, SHORT_STEPS, BATCH, SEQ_LEN = 300, 60, 16, 256
VALID_CHARS, NOVELS_CHARS = 100_000, 400_000
RATIOS = (0.3, 0.5)
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": True},
    "all weights": {"lora": False},
    "distillation": {"lora": False, "distil": True},
}
RATES = {
    "LoRA": (1e-4, 1e-3, 3e-3),
    "all weights": (1e-4, 3e-4, 1e-3),
    "dense": (1e-4, 3e-4, 1e-3),
}
ALPHAS = (0.5, 1.0)
"""Weights of the teacher that are tried, at the learning rate of all weights."""


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHARED / "models" / "ref10m")


def dense() -> PreTrainedModel:
    """A fresh copy: training changes it."""
    return AutoModelForCausalLM.from_pretrained(SHARED / "models" / "ref10m", dtype=torch.float32).eval()


def start(ratio: float, repair: str, work: Path) -> PreTrainedModel:
    """The model that a run starts from, pruned once; ratio 0 is the dense one."""
    if ratio == 0:
        return dense()
    directory = work / f"start-{ratio}-{repair}"
    if not directory.exists():
        config = LLMPrunerConfig(ratio)
        if repair != "none":
            config = dataclasses.replace(config, repair=repair)  # type: ignore[call-arg]
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


def train(ratio: float, repair: str, kind: dict[str, Any], rate: float, alpha: float, steps: int, work: Path) -> Any:
    """One training run, from its last checkpoint if it was interrupted."""
    valid = work / "valid.txt"
    if not valid.exists():
        work.mkdir(parents=True, exist_ok=True)
        valid.write_text(load_text(SHARED / "data" / "wikitext2" / "valid.txt", max_chars=VALID_CHARS))
    name = f"{ratio}-{repair}-{'lora' if kind['lora'] else 'full'}-{'kd' if kind.get('distil') else 'lm'}"
    output = work / f"{name}-{rate}-{alpha}-{steps}"
    began = time.perf_counter()
    result = recover(
        start(ratio, repair, work),
        output,
        train=str(TRAIN),
        eval=str(valid),
        tokenizer=tokenizer(),
        lora=kind["lora"],
        teacher=dense() if kind.get("distil") else None,
        alpha=alpha,
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


def choices(results: dict[str, Any], work: Path) -> dict[str, dict[str, float]]:
    """Learning rate (and weight of the teacher) with the lowest validation perplexity after `SHORT_STEPS`."""
    tried = results.setdefault("tried", [])

    def best(name: str, rates: tuple[float, ...], alphas: tuple[float, ...] = ALPHAS[:1]) -> dict[str, float]:
        kind, ratio = KINDS.get(name, {"lora": False}), 0.0 if name == "dense" else 0.5
        for rate, alpha in itertools.product(rates, alphas):
            if not any((t["kind"], t["learning_rate"], t["alpha"]) == (name, rate, alpha) for t in tried):
                found = train(ratio, "none", kind, rate, alpha, SHORT_STEPS, work)
                tried.append({"kind": name, "learning_rate": rate, "alpha": alpha, "valid": found.perplexity_after})
                save(results)
        found = min((t for t in tried if t["kind"] == name), key=lambda t: t["valid"])
        return {"learning_rate": found["learning_rate"], "alpha": found["alpha"]}

    chosen = {name: best(name, rates) for name, rates in RATES.items()}
    rate = chosen["all weights"]["learning_rate"]
    return chosen | {"distillation": best("distillation", (rate,), ALPHAS)}


def run(repair: str, work: Path) -> None:
    """Measure every cell that docs/recovery.json does not hold yet."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {**circumstances(), "rows": []}
    cells = [(0.0, "none", "none"), *((ratio, repair, "none") for ratio in RATIOS)]
    cells += [(ratio, repair, kind) for ratio in RATIOS for kind in KINDS] + [(0.0, "none", "all weights")]
    done = {(row["pruning_ratio"], row["repair"], row["kind"]) for row in results["rows"]}
    for ratio, repaired, kind in (cell for cell in cells if cell not in done):
        row: dict[str, Any] = {"pruning_ratio": ratio, "repair": repaired, "kind": kind}
        if kind == "none":
            model = start(ratio, repaired, work)
        else:
            chosen = choices(results, work)["dense" if ratio == 0 else kind]
            began = time.perf_counter()
            rate, alpha = chosen["learning_rate"], chosen["alpha"]
            found = train(ratio, repaired, KINDS[kind], rate, alpha, STEPS, work)
            row |= chosen | {"train_s": time.perf_counter() - began, "valid": found.perplexity_after}
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
    order = ["none", *KINDS]
    rows = sorted(results["rows"], key=lambda r: (r["pruning_ratio"], r["repair"] != "none", order.index(r["kind"])))
    lines = [
        {
            "removed": f"{100 * row['pruning_ratio']:.0f} %",
            "repair": "" if row["repair"] == "none" else row["repair"].replace("_", " "),
            "training": {"none": "none"}.get(row["kind"], row["kind"]),
            "learning rate": f"{row['learning_rate']:g}" if "learning_rate" in row else "",
            "parameters": f"{row['num_parameters']:,}",
            "WikiText-2 test": f"{row['wikitext2']:.2f}",
            "novels": f"{row['novels']:.2f}",
            "minutes": f"{row['train_s'] / 60:.0f}" if "train_s" in row else "",
        }
        for row in rows
    ]
    before, rest = PAGE.read_text().split("<!-- results -->", 1)
    after = rest.split("<!-- /results -->", 1)[1]
    PAGE.write_text(f"{before}<!-- results -->\n{markdown_table(lines)}<!-- /results -->{after}")


def main(
    repair: Annotated[str, typer.Option(help="The `repair` of the configuration.")] = "none",
    work: Annotated[Path, typer.Option(help="Where runs keep their checkpoints.")] = ROOT / "build" / "recovery",
    tables_only: Annotated[bool, typer.Option(help="Only write the table from docs/recovery.json.")] = False,
) -> None:
    """Measure recovery on ref10m and write the table."""
    torch.set_num_threads(1)
    if not tables_only:
        run(repair, work)
    write_table(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    typer.run(main)
