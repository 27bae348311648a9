"""Recovery of a real model on several texts, as ratios to the dense one: docs/recovery_smollm2.json and its table.

    python tests/benchmarks/recovery_smollm2.py MODEL --device cuda [--seconds 280] [--rows "distill 30 %;lora 30 %"]
    python tests/benchmarks/recovery_smollm2.py MODEL --pruned PRUNED --work WORK --rows "distill 20 %, recommended"
    python tests/benchmarks/recovery_smollm2.py MODEL --tables-only

MODEL is SmolLM2-135M-Instruct. It is pruned by `OBSConfig(ratio)`, repaired on 128 × 256 tokens of the training
mixture, and trained on at most 2 M tokens of it: a third each of WikiText-2 train, novels and instructions, 16 windows
of 256 tokens a step. Rows called `recommended` start from checkpoints in PRUNED, `20 %` and `30 %`: widths from curves,
Fisher scores, least squares, layers trained, then the step end to end (`quality.py`). With `--work` training goes on
from its last checkpoint after an interruption. Perplexity: windows of 256 without overlap, no BOS, float32, spread over
each text; the intervals are those of `evaluate`. Two of the texts are of kinds that nothing was calibrated, trained or
chosen with. Every row is written when it is measured, and those that are there are not measured again. With `--seconds`
no row is begun that would not be done in that time, and training takes as many tokens (up to 2 M) as the time allows.
Texts are tokenised once (`--texts-only`). Data are read from `HF_PRUNE_DATA` (default `../shared`).
"""

from __future__ import annotations

import copy
import json
import os
import platform
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from quality import texts_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_prune import OBSConfig, prune, recover
from hf_prune.calibration import calibration_batches, training_windows
from hf_prune.checkpoint.save_hook import plan_of
from hf_prune.evaluation import evaluate, flat, read_texts
from hf_prune.loading import load_model
from hf_prune.recovery.arguments import distillation_rate
from hf_prune.report.tables import markdown_table

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("HF_PRUNE_DATA", ROOT.parent / "shared"))
PAGE = ROOT / "docs" / "recovery.md"
TRAIN = ("wikitext2_train", "novels_train", "instructions_train")
VALID = ("wikitext2_valid", "novels_valid", "instructions_valid")
JUDGED = ("wikitext2_test", "novels_test", "boolq", "lambada")
CHARS = {"train": 3_000_000, "valid": 100_000, "test": 600_000}
NOVELS = {"train": (0, 3_000_000), "valid": (8_000_000, 8_100_000), "test": (10_000_000, 10_600_000)}
"""Characters, of different books."""
SEQ_LEN, BATCH, TOKENS = 256, 16, 2_000_000
DISTILL = {"preset": "distill"}
ROWS: dict[str, tuple[float, dict[str, Any]]] = {
    "distill 30 %": (0.3, DISTILL),
    "distill 20 %": (0.2, DISTILL),
    "distill 50 %": (0.5, DISTILL),
    "full 30 %": (0.3, {"preset": "full", "rate": 1.0}),
    "lora 30 %": (0.3, {"preset": "lora", "learning_rate": 1e-3}),
    "norms 30 %": (0.3, {"preset": "norms"}),
    "distill 30 %, twice the rate": (0.3, {"preset": "distill", "rate": 2.0}),
    "distill 30 %, half the rate": (0.3, {"preset": "distill", "rate": 0.5}),
    "distill 30 %, alpha 0.5": (0.3, {"preset": "distill", "alpha": 0.5}),
    "distill 50 %, twice the rate": (0.5, {"preset": "distill", "rate": 2.0}),
    "lora 30 %, towards the dense model": (0.3, {"preset": "lora", "learning_rate": 1e-3, "taught": True}),
    "distill 20 %, recommended": (0.2, DISTILL),
    "distill 30 %, recommended": (0.3, DISTILL),
    "distill 20 %, recommended, three times the rate": (0.2, {"preset": "distill", "rate": 3.0}),
    "distill 30 %, recommended, three times the rate": (0.3, {"preset": "distill", "rate": 3.0}),
}
"""Name → ratio, what is asked of `recover` (`rate`: times that of `distillation_rate`); the most wanted first."""
RECOMMENDED = ", recommended"
"""In names: from checkpoints that were pruned as the page recommends."""


def start_of(name: str) -> str:
    """What a row is called that starts where this one does, and is not trained."""
    return f"none {100 * ROWS[name][0]:.0f} %{RECOMMENDED * (RECOMMENDED in name)}"


def write_texts(data: Path, folder: Path) -> None:
    """All texts, as files."""
    found = texts_of(data, CHARS, NOVELS, ("dolly_hhrlhf_1k", "self_instruct_seed175"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in found.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def write_windows(tokenizer: Any, texts: Path) -> None:
    """Tokenise all texts once: training, calibration and validation windows of the mixtures, judged texts."""
    paths = {names: [str(texts / f"{name}.txt") for name in names] for names in (TRAIN, VALID, JUDGED)}
    found: dict[str, Any] = {
        "train": training_windows(tokenizer, paths[TRAIN], SEQ_LEN, number=-(-TOKENS // SEQ_LEN)),
        "valid": training_windows(tokenizer, paths[VALID], SEQ_LEN, number=96),
        "judged": read_texts(tokenizer, paths[JUDGED], SEQ_LEN, 96),
    }
    options = {"num_samples": 128, "seq_len": SEQ_LEN, "batch_size": 128, "seed": 0}
    found["calibration"] = calibration_batches(tokenizer, paths[TRAIN], **options)[0]["input_ids"]
    found = {key: value.int() if key != "judged" else value for key, value in found.items()}
    found["judged"] = {Path(name).stem: ids.int() for name, ids in found["judged"].items()}
    torch.save(found, texts / "windows.pt")


class Bench:
    """The dense model, windows of its texts, and pruned models as they were made."""

    def __init__(
        self,
        model: str,
        texts: Path,
        device: str,
        windows: int,
        samples: int,
        ends: float | None,
        checkpoints: Path | None,
        work: Path | None,
    ) -> None:
        self.dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.device, self.ends, self.checkpoints, self.work = device, ends, checkpoints, work
        found = torch.load(texts / "windows.pt")
        self.judged = {
            name: ids[torch.arange(min(windows, len(ids))) * len(ids) // min(windows, len(ids))].long()
            for name, ids in found["judged"].items()
        }
        self.calibration = [{"input_ids": ids.long()} for ids in found["calibration"][:samples].split(16)]
        self.train_rows, self.valid_rows = (
            [{"input_ids": ids.long(), "labels": ids.long()} for ids in found[name]] for name in ("train", "valid")
        )
        self.valid_rows = self.valid_rows[:: 3 if device == "cpu" else 1]
        self.scores: Any = None
        self.pruned: dict[float, tuple[PreTrainedModel, float]] = {}

    def start(self, name: str) -> tuple[PreTrainedModel, float]:
        """A copy of the pruned and repaired model that a row starts from, and the share of the decoder that went."""
        torch.set_float32_matmul_precision("highest")
        ratio = ROWS[name][0]
        if RECOMMENDED in name:
            if self.checkpoints is None:
                raise typer.BadParameter(f"{name!r} starts from a checkpoint; say where by --pruned.")
            path = self.checkpoints / f"{100 * ratio:.0f} %"
            model = load_model(str(path), dtype="float32").to(self.device)
            plan = plan_of(model)
            assert plan is not None
            return model.eval(), plan.achieved["decoder"]
        if ratio not in self.pruned:
            self.dense.requires_grad_(True)  # a teacher is frozen
            config = OBSConfig(ratio, num_samples=128, seq_len=SEQ_LEN)
            result = prune(self.dense, config, calibration=self.calibration, scores=self.scores)
            self.scores = result.scores
            self.pruned[ratio] = result.model.eval(), result.plan.achieved["decoder"]
        model, removed = self.pruned[ratio]
        return copy.deepcopy(model), removed

    def affordable(self, model: PreTrainedModel, tokens: int) -> int:
        """As many tokens, up to `tokens`, as there is time to train on: by four steps that are thrown away."""
        if self.ends is None:
            return tokens
        trial, began = copy.deepcopy(model).train(), 0.0
        for step in range(5):
            ids = torch.stack([row["input_ids"] for row in self.train_rows[:BATCH]]).to(self.device)
            with torch.no_grad():
                taught = self.dense(input_ids=ids).logits.log_softmax(-1)
            learnt = trial(input_ids=ids).logits.log_softmax(-1)
            torch.nn.functional.kl_div(learnt, taught, reduction="sum", log_target=True).backward()
            float(trial.get_input_embeddings().weight.grad[0, 0])  # waits for the device
            began = time.monotonic() if step == 0 else began
        step_s = (time.monotonic() - began) / 4
        left = self.ends - time.monotonic() - 15
        return max(0, min(tokens, int(left / (1.2 * step_s)) * BATCH * SEQ_LEN))

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """Ratios to the dense model on the judged texts."""
        torch.set_float32_matmul_precision("highest")
        found = flat(evaluate(model.eval(), self.tokenizer, self.judged, dense=self.dense, progress=False))
        for row in found["texts"]:
            row["num_tokens"] = int(row["num_tokens"])
        return {"num_parameters": model.num_parameters(), **found}

    def train(self, name: str, most: int) -> dict[str, Any]:
        """One row: prune, train, measure."""
        ratio, asked = ROWS[name]
        settings = dict(asked)
        model, removed = self.start(name)
        rate, taught = settings.pop("rate", None), settings.pop("taught", settings["preset"] == "distill")
        if rate is not None:
            settings["learning_rate"] = rate * distillation_rate(model.num_parameters(), removed)
        if taught:
            settings["teacher"] = self.dense
        torch.set_float32_matmul_precision("high")  # TF32 on an accelerator, for training alone
        tokens = self.affordable(model, most)
        if not tokens:
            return {}
        on_cpu = self.device == "cpu"
        parts = 4 if on_cpu else 1
        kept: dict[str, Any] = {"save_strategy": "no"}
        if self.work is not None:
            kept = {"resume": True, "overwrite": True, "save_strategy": "steps"}
        with tempfile.TemporaryDirectory() if self.work is None else nullcontext(self.work / name) as folder:
            began = time.perf_counter()
            result = recover(
                model,
                f"{folder}/out",
                train=self.train_rows,
                eval=self.valid_rows,
                tokenizer=self.tokenizer,
                tokens=tokens,
                seq_len=SEQ_LEN,
                per_device_train_batch_size=BATCH // parts,
                gradient_accumulation_steps=parts,
                per_device_eval_batch_size=2 * BATCH // parts,
                use_cpu=on_cpu,
                bf16=on_cpu,
                disable_tqdm=True,
                load_best_model_at_end=False,
                **kept,
                **settings,
            )
        train_s = time.perf_counter() - began
        curve = [
            {key: entry[key] for key in ("step", "eval_text_loss", "eval_other_loss") if key in entry}
            for entry in result.log_history
            if "eval_text_loss" in entry or "eval_other_loss" in entry
        ]
        rates = [entry["learning_rate"] for entry in result.log_history if "learning_rate" in entry]
        return {
            "pruning_ratio": ratio,
            "removed": removed,
            "settings": asked,
            "learning_rate": max(rates, default=None),
            "tokens": tokens,
            "train_s": train_s,
            "curve": curve,
            "other": [result.other_before, result.other_after],
            **self.measure(result.model),
        }


def run(bench: Bench, output: Path, names: list[str], tokens: int, circumstances: dict[str, Any]) -> None:
    """Measure every row that `output` does not hold yet."""
    results = json.loads(output.read_text()) if output.exists() else {**circumstances, "rows": {}}
    for name in names:
        before = start_of(name)
        if name in results["rows"]:
            continue
        start = time.monotonic()
        if before not in results["rows"]:
            model, removed = bench.start(name)
            prune_s = time.monotonic() - start
            results["rows"][before] = {"removed": removed, "prune_s": prune_s, **bench.measure(model)}
            save(results, output)
            print(before, round(results["rows"][before]["ratio"], 4), f"{prune_s:.0f} s", flush=True)
            start = time.monotonic()
        found = bench.train(name, tokens)
        if not found:
            return
        results["rows"][name] = found
        save(results, output)
        print(name, round(results["rows"][name]["ratio"], 4), f"{time.monotonic() - start:.0f} s", flush=True)


def save(results: dict[str, Any], output: Path) -> None:
    """Write the results, by renaming: an interruption leaves the old file."""
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    temporary.replace(output)


def write_table(results: dict[str, Any]) -> None:
    """Write the table between the markers of docs/recovery.md."""
    lines = []
    for name, row in results["rows"].items():
        ratios = {text["text"]: f"{text['ratio']:.3f}" for text in row["texts"]}
        lines.append(
            {
                "training, removed": name,
                "learning rate": f"{row['learning_rate']:.2g}" if row.get("learning_rate") else "",
                "tokens": f"{row['tokens'] / 1e6:.2f} M" if row.get("tokens") else "",
                "parameters": f"{row['num_parameters']:,}",
                "mean of ratios": f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
                **{text: ratios[text] for text in JUDGED},
            }
        )
    before, rest = PAGE.read_text().split("<!-- smollm2 -->", 1)
    after = rest.split("<!-- /smollm2 -->", 1)[1]
    PAGE.write_text(f"{before}<!-- smollm2 -->\n{markdown_table(lines)}<!-- /smollm2 -->{after}")


def main(
    model: Annotated[str, typer.Argument(help="Directory of SmolLM2-135M-Instruct.")],
    output: Annotated[Path, typer.Option(help="The results.")] = ROOT / "docs" / "recovery_smollm2.json",
    texts: Annotated[Path, typer.Option(help="Folder of the texts; made if missing.")] = ROOT / "build" / "texts",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    rows: Annotated[str, typer.Option(help="Names, separated by semicolons. Default: all.")] = "",
    seconds: Annotated[float | None, typer.Option(help="Begin no row that would not be done by then.")] = None,
    windows: Annotated[int, typer.Option(help="Of each judged text.")] = 96,
    samples: Annotated[int, typer.Option(help="Windows to calibrate with.")] = 128,
    tokens: Annotated[int, typer.Option(help="To train on.")] = TOKENS,
    pruned: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoints `recommended` rows start from.")
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for checkpoints of training, kept.")] = None,
    texts_only: Annotated[bool, typer.Option(help="Only write the texts.")] = False,
    tables_only: Annotated[bool, typer.Option(help="Only write the table.")] = False,
) -> None:
    """Measure recovery on SmolLM2, and write the table."""
    began = time.monotonic()
    if not texts.exists():
        write_texts(SHARED / "data", texts)
    if not (texts / "windows.pt").exists():
        write_windows(AutoTokenizer.from_pretrained(model), texts)
    if texts_only:
        return
    if not tables_only:
        circumstances = {
            "model": "SmolLM2-135M-Instruct",
            "calibration": f"{samples} x {SEQ_LEN} tokens",
            "training": f"{tokens} tokens, {BATCH} x {SEQ_LEN} a step, AdamW, linear decay",
            "windows": windows,
            "device": torch.cuda.get_device_name(0) if device != "cpu" else f"{platform.machine()} CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        bench = Bench(
            model, texts, device, windows, samples, None if seconds is None else began + seconds, pruned, work
        )
        run(bench, output, [name for name in rows.split(";") if name] or list(ROWS), tokens, circumstances)
    if tables_only or output.parent == PAGE.parent:
        write_table(json.loads(output.read_text()))


if __name__ == "__main__":
    typer.run(main)
