"""Perplexity of every method on a real model, on several texts, as ratios to the dense model; writes one JSON.

    python tests/benchmarks/quality.py --model MODEL --data ../shared/data --output quality.json [--device cuda]
        [--rows "obs;fisher"] [--ratios 0.3] [--seconds 400] [--windows 48]

Calibration text is a third each of WikiText-2 train, novels and instructions. Perplexity is measured, in windows of 256
tokens spread over each text, on `JUDGED` texts (two of them of kinds that nothing is calibrated with) and on
`CHOSEN_BY` texts, by which settings are chosen. Weights and passes are float32. Every row is written as soon as it is
measured; those that FILE.json holds already are not measured again. Scores serve all ratios, plans both repairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from quality_rows import ROWS, Row
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_prune import LLMPrunerConfig, PruningConfig, infer_structure
from hf_prune.calibration import calibration_batches
from hf_prune.data import evaluation_windows
from hf_prune.evaluation import num_parameters
from hf_prune.layers.losses import next_token
from hf_prune.layers.walk import Walk
from hf_prune.layers.work import WorkDir
from hf_prune.pipeline import apply_and_repair, decide, scoring_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from hf_prune.plan import PruningPlan

WINDOW = 256
BATCH, LARGE_BATCH = 8, 32
"""Windows at a time, and in calibration on an accelerator; changes nothing beyond rounding."""
JUDGED = ("wikitext2_test", "novels_test", "boolq", "lambada")
CHOSEN_BY = ("wikitext2_valid", "novels_valid", "instructions_valid")
CHARS = {"train": 3_000_000, "valid": 600_000, "test": 600_000}
"""So much of WikiText-2, from the start; of passages and of LAMBADA as much as of a test text."""
NOVELS = {"train": (0, 3_000_000), "valid": (8_000_000, 8_600_000), "test": (10_000_000, 10_600_000)}
"""Characters of the novels, which are of different books."""
INSTRUCTIONS = ("dolly_hhrlhf_1k",)
HELD_OUT_INSTRUCTIONS = 150
Result = dict[str, Any]


def texts_of(
    data: Path,
    chars: Mapping[str, int] = CHARS,
    novels: Mapping[str, tuple[int, int]] = NOVELS,
    instructions: Sequence[str] = INSTRUCTIONS,
) -> dict[str, str]:
    """All texts by name; `*_train` are those to calibrate with."""

    def records(path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / path).read_text(encoding="utf-8").splitlines()]

    found = {
        f"wikitext2_{part}": (data / "wikitext2" / f"{part}.txt").read_text("utf-8")[:most]
        for part, most in chars.items()
    }
    whole = (data / "prose" / "novels.txt").read_text(encoding="utf-8")
    found |= {f"novels_{part}": whole[start:end] for part, (start, end) in novels.items()}
    asked = [
        "\n".join(filter(None, (row["instruction"], row["input"], row["output"])))
        for name in instructions
        for row in records(f"instruct/{name}.jsonl")
    ]
    found["instructions_train"] = "\n\n".join(asked[HELD_OUT_INSTRUCTIONS:])
    found["instructions_valid"] = "\n\n".join(asked[:HELD_OUT_INSTRUCTIONS])
    passages = [row["context"].removeprefix("Passage: ") for row in records("zeroshot/boolq_dev.jsonl")]
    passages = [passage.partition("\nQuestion: ")[0].strip() for passage in passages]
    endings = [row["context"] + row["choices"][row["answer"]] for row in records("zeroshot/lambada_openai.jsonl")]
    found |= {name: "\n\n".join(rows)[: chars["test"]] for name, rows in (("boolq", passages), ("lambada", endings))}
    return found


@torch.no_grad()
def perplexity_of(model: PreTrainedModel, batches: Sequence[Tensor]) -> float:
    """Of windows, in batches `[B, T]`."""
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for ids in batches:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        total += next_token(logits[:, :-1], ids[:, 1:]).sum(dtype=torch.float64)
    return math.exp(min(float(total) / sum(ids[:, 1:].numel() for ids in batches), 700))


class Bench:
    """The dense model, the texts, and what was scored so far."""

    def __init__(
        self,
        model: Path,
        data: Path,
        device: str,
        windows: int,
        kept: Path | None,
        least: int | None,
        work: WorkDir | None = None,
    ) -> None:
        self.dense: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.structure = infer_structure(self.dense)
        self.texts = texts_of(data)
        self.kept, self.least, self.work = kept, least, work
        self.scores: dict[str, dict[str, Tensor]] = {}
        self.plans: dict[str, PruningPlan] = {}
        self.data: dict[tuple[int, int], list[dict[str, Tensor]]] = {}
        self.windows: dict[str, list[Tensor]] = {}
        for name in (*JUDGED, *CHOSEN_BY):
            own = evaluation_windows(self.tokenizer, self.texts[name], WINDOW)
            own = own[torch.arange(min(windows, len(own))) * len(own) // min(windows, len(own))]
            self.windows[name] = list(own.split(BATCH))
        dense = Walk(self.dense, self.structure.layer_paths, self.windows[JUDGED[0]])
        self.protocol = dense.protocol

    def calibration(self, num_samples: int, seq_len: int = WINDOW) -> list[dict[str, Tensor]]:
        """Windows of the mixture."""
        num_samples = min(num_samples, self.least or num_samples)
        key = num_samples, seq_len
        if key not in self.data:
            with tempfile.TemporaryDirectory() as folder:
                names = ("wikitext2_train", "novels_train", "instructions_train")
                files = [Path(folder) / f"{name}.txt" for name in names]
                for name, file in zip(names, files, strict=True):
                    file.write_text(self.texts[name], encoding="utf-8")
                self.data[key] = calibration_batches(
                    self.tokenizer,
                    [str(file) for file in files],
                    num_samples=num_samples,
                    seq_len=seq_len,
                    batch_size=BATCH if self.dense.device.type == "cpu" else LARGE_BATCH,
                    seed=0,
                )
        return self.data[key]

    def measure(self, model: PreTrainedModel, plan: PruningPlan | None = None) -> Result:
        """Perplexity on every text, and the size."""
        found: Result = {"num_parameters": num_parameters(model)}
        if plan is not None:
            found["achieved"] = plan.achieved
        for name, windows in self.windows.items():
            found[name] = perplexity_of(model, windows)
        return found

    def config_of(self, row: Row, ratio: float) -> PruningConfig:
        """The configuration of a row without repair: one plan serves both."""
        num_layers = len(self.structure.layer_paths)
        if "preset" in row.config:
            return LLMPrunerConfig.preset(row.config["preset"], ratio * num_layers / (num_layers - 6), num_layers)
        settings = {"num_samples": row.num_samples, "seq_len": WINDOW, "repair": "none"}
        if row.config["method"] == "policy_gradient":
            settings["seq_len"] = 128
        config = PruningConfig.from_dict({"pruning_ratio": ratio, **settings, **row.config})
        if self.least and config.method in ("policy_gradient", "prunenet"):
            steps = "policy_steps" if config.method == "policy_gradient" else "num_episodes"
            config = dataclasses.replace(config, **{steps: self.least})
        return config

    def plan_of(self, row: Row, ratio: float) -> tuple[PruningPlan, PruningConfig]:
        """What goes; several rows may ask for the same."""
        config = self.config_of(row, ratio)
        if config.num_steps > 1 and config.method == "obs":
            config = dataclasses.replace(config, repair="least_squares")
        batches = self.calibration(config.num_samples, config.seq_len)
        if config.to_json() not in self.plans:
            settings = {**scoring_settings(config), "allocation": None}
            if config.method == "prunenet":
                settings |= {"pruning_ratio": None}
            key = json.dumps(settings, sort_keys=True)
            scores = self.scores.get(key) if config.num_steps == 1 else None
            if scores is None and config.method == "prunenet" and self.kept is not None and self.kept.exists():
                scores = torch.load(self.kept)
            work = self.work if config.allocation == "curves" else None  # measured once for all ratios
            plan, found = decide(
                self.dense, self.structure, config, batches, scores=scores, work=work, protocol=self.protocol
            )
            if config.num_steps == 1:
                self.scores[key] = found
            if config.method == "prunenet" and self.kept is not None:
                torch.save(dict(found), self.kept)
            self.plans[config.to_json()] = plan
        return self.plans[config.to_json()], config

    def pruned(self, row: Row, ratio: float, repaired: bool) -> tuple[PreTrainedModel, PruningPlan]:
        """The model of a row."""
        plan, config = self.plan_of(row, ratio)
        how = {"repair": "least_squares", **row.repair} if repaired else {"repair": "none"}
        config = dataclasses.replace(config, **how)
        batches = self.calibration(row.num_samples)
        return apply_and_repair(self.dense, self.structure, plan, config, batches, protocol=self.protocol), plan


def asked(rows: Sequence[str], ratios: Sequence[float]) -> Iterator[tuple[Row, float, bool]]:
    """Rows of some groups (or of some names), ratio after ratio."""
    chosen = [row for row in ROWS if not rows or row.group in rows or row.name in rows]
    for row in chosen:
        for ratio in row.ratios:
            for repaired in row.repairs if not ratios or ratio in ratios else ():
                yield row, ratio, repaired


def save(results: Result, path: Path) -> None:
    """By renaming: an interruption leaves the old file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    """Measure what the output does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", default="", help="groups or names, with semicolons between")
    parser.add_argument("--ratios", default="", help="with commas between")
    parser.add_argument("--seconds", type=float, default=1e9, help="no row is begun after so many")
    parser.add_argument("--windows", type=int, default=48, help="of each text")
    parser.add_argument("--least", type=int, help="a trial: so many calibration windows and steps of learning at most")
    parser.add_argument("--scores", type=Path, help="where scores of PruneNet, which take long, are kept")
    given = parser.parse_args()
    begin = time.monotonic()
    rows = [name for name in given.rows.split(";") if name]
    ratios = [float(ratio) for ratio in given.ratios.split(",") if ratio]
    work = WorkDir(given.output.with_suffix(".work"))
    bench = Bench(given.model, given.data, given.device, given.windows, given.scores, given.least, work)
    device = torch.cuda.get_device_name() if given.device.startswith("cuda") else f"{platform.machine()} CPU"
    results: Result = {
        "model": given.model.name,
        "window": WINDOW,
        "windows": {name: sum(map(len, own)) for name, own in bench.windows.items()},
        "dtype": "float32",
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": [],
    }
    if given.output.exists():  # a file keeps what its first rows were measured on
        results |= json.loads(given.output.read_text("utf-8"))
    if "dense" not in results:
        results["dense"] = bench.measure(bench.dense)
        save(results, given.output)
        print("dense", results["dense"], flush=True)
    for row, ratio, repaired in asked(rows, ratios):
        key = {"name": row.name, "ratio": ratio, "repaired": repaired}
        if any({name: known[name] for name in key} == key for known in results["rows"]):
            continue
        if time.monotonic() - begin > given.seconds:
            break
        start = time.monotonic()
        try:
            model, plan = bench.pruned(row, ratio, repaired)
            found = bench.measure(model, plan)
            del model
        except Exception as error:  # the other rows are still to be measured
            print("failed", key, repr(error), flush=True)
            continue
        found |= {**key, "device": device, "seconds": round(time.monotonic() - start, 1)}
        results["rows"].append(found)
        save(results, given.output)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
