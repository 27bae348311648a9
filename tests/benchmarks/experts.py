"""Whole experts against channels inside of them, on a small trained mixture: writes docs/experts.json and the table.

    python tests/benchmarks/experts.py --model refmoe       # measure what is missing, then write the table
    python tests/benchmarks/experts.py --tables-only

The mixture is made by `examples/train_demo_model.py` (its docstring has the command). Removed are 25 and 50 % of the
experts' parameters; every row removes as many parameters, from another place or by another score. All rows share
calibration and evaluation texts. A result is written as soon as it is measured, so an interrupted run goes on.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import PruningConfig, infer_structure, prune
from hf_prune.data import evaluation_windows, load_text
from hf_prune.layers.losses import divergence, next_token
from hf_prune.pipeline import calibration_data, scoring_settings
from hf_prune.report.tables import markdown_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("HF_PRUNE_DATA", ROOT.parent / "shared"))
RESULTS, PAGE = ROOT / "docs" / "experts.json", ROOT / "docs" / "experts.md"
WINDOW, WINDOWS = 256, 32
CALIBRATION = {"num_samples": 32, "seq_len": WINDOW}
SHARES = (0.25, 0.5)
TEXTS = {"wikitext2": "WikiText-2", "novels": "novels"}

_EXPERTS: dict[str, Any] = {"axes": ["expert"], "allocation": "uniform"}
_GLOBAL = {**_EXPERTS, "allocation": "global"}
_CHANNELS = {"axes": ["mlp"], "allocation": "global"}
_OWN = {**_CHANNELS, "axes": ["expert_channels"]}
_OWN = {"axes": ["expert_channels"], "allocation": "global"}
_REPAIR = {"repair": "least_squares"}
_FISHER = {"method": "llm_pruner"}
ROWS: dict[str, dict[str, Any]] = {
    "experts, random (seed 0)": {**_EXPERTS, "method": "random", "seed": 0},
    "experts, random (seed 1)": {**_EXPERTS, "method": "random", "seed": 1},
    "experts, random (seed 2)": {**_EXPERTS, "method": "random", "seed": 2},
    "experts, magnitude": {**_EXPERTS, "method": "magnitude"},
    "experts, frequency": {**_EXPERTS, "method": "reap", "criterion": "frequency"},
    "experts, largest gate × norm": {**_EXPERTS, "method": "reap", "criterion": "max"},
    "experts, sum of gate × norm": {**_EXPERTS, "method": "reap", "criterion": "sum"},
    "experts, REAP": {**_EXPERTS, "method": "reap"},
    "experts, Fisher of the gate": {**_EXPERTS, **_FISHER},
    "experts, REAP, global": {**_GLOBAL, "method": "reap"},
    "experts, sum of gate × norm, global": {**_GLOBAL, "method": "reap", "criterion": "sum"},
    "experts, Fisher of the gate, global": {**_GLOBAL, **_FISHER},
    "experts, Fisher of the gate, global, repaired": {**_GLOBAL, **_FISHER, **_REPAIR},
    "channels of all experts, magnitude": {"axes": ["mlp"], "allocation": "uniform", "method": "magnitude"},
    "channels of all experts, Fisher": {**_CHANNELS, **_FISHER},
    "channels of all experts, Fisher, repaired": {**_CHANNELS, **_FISHER, **_REPAIR},
    "channels of all experts, OBS, repaired": {**_CHANNELS, "method": "obs"},
    "channels of each expert, magnitude": {"axes": ["expert_channels"], "allocation": "uniform", "method": "magnitude"},
    "channels of each expert, Fisher": {**_OWN, **_FISHER},
    "channels of each expert, Fisher, repaired": {**_OWN, **_FISHER, **_REPAIR},
    "channels of each expert, OBS, repaired": {**_OWN, "method": "obs"},
    "channels of each expert by itself, Fisher": {**_OWN, **_FISHER},
    "channels of each expert by itself, Fisher, repaired": {**_OWN, **_FISHER, **_REPAIR},
    "channels of each expert by itself, OBS, repaired": {**_OWN, "method": "obs"},
    "experts, channels and attention, Fisher": {**_GLOBAL, **_FISHER, "axes": ["expert", "mlp", "attention"]},
    "experts, channels and attention, Fisher, repaired": {
        **_GLOBAL,
        **_FISHER,
        **_REPAIR,
        "axes": ["expert", "mlp", "attention"],
    },
}


class Bench:
    """The mixture, its texts, and what the dense model says of them."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.structure = infer_structure(self.model)
        data = SHARED / "data"
        texts = {"wikitext2": data / "wikitext2" / "test.txt", "novels": data / "prose" / "novels.txt"}
        read = {name: load_text(file, max_chars=400_000) for name, file in texts.items()}
        self.windows = {n: evaluation_windows(self.tokenizer, own, WINDOW)[:WINDOWS] for n, own in read.items()}
        self.dense = {name: [self._logits(self.model, row) for row in own] for name, own in self.windows.items()}
        self.scores: dict[str, Any] = {}
        self.calibration = calibration_data(
            PruningConfig(0.5, allocation="search", **CALIBRATION),  # type: ignore[arg-type]  # one that needs data
            self.tokenizer,
            str(data / "wikitext2" / "train.txt"),
            8,
        )
        decoder = self.structure.num_parameters(budget="decoder")
        fewer = {axis.name: 0 for axis in self.structure.axes_of("expert")}
        self.experts = 1 - self.structure.num_parameters(fewer, "decoder") / decoder
        """Share of the decoder's parameters that experts and their rows of the routers have."""

    @staticmethod
    def _logits(model: PreTrainedModel, row: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=row[None], use_cache=False).logits[0]  # type: ignore[no-any-return]

    def measure(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """Perplexity, and divergence from the dense model in nats per token."""
        found = {}
        for name, own in self.windows.items():
            nll, kl = [], []
            for row, dense in zip(own, self.dense[name], strict=True):
                logits = self._logits(model, row)
                nll.append(next_token(logits[None, :-1], row[None, 1:]).mean())
                kl.append(divergence(dense, logits).mean())
            found[name] = {"perplexity": float(torch.stack(nll).mean().exp()), "kl": float(torch.stack(kl).mean())}
        return found

    def row(self, share: float, values: dict[str, Any]) -> dict[str, Any]:
        """Prune by one row at one share of the experts' parameters, and measure."""
        config = PruningConfig.from_dict({**values, **CALIBRATION, "pruning_ratio": share * self.experts})
        key = json.dumps(scoring_settings(config), sort_keys=True)
        result = prune(self.model, config, calibration=self.calibration, scores=self.scores.get(key))
        self.scores[key] = result.scores
        widths = [result.plan.widths[axis.name] for axis in self.structure.axes_of("expert")]
        found = {"achieved": result.plan.achieved["decoder"], "experts": widths, "commit": commit()}
        return {**found, **self.measure(result.model)}


def main(
    model: Annotated[Path, typer.Option(help="Directory of the mixture.")] = SHARED / "models" / "refmoe",
    only: Annotated[str, typer.Option(help="Measure only rows whose label holds this.")] = "",
    seconds: Annotated[float, typer.Option(help="Begin no row after so long; the next run goes on.")] = float("inf"),
    tables_only: Annotated[bool, typer.Option(help="Only write the table from docs/experts.json.")] = False,
) -> None:
    """Measure on the mixture and write the table."""
    stop = time.perf_counter() + seconds
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": {}}
    if not tables_only:
        bench = Bench(model)
        results |= circumstances(bench)
        if "dense" not in results:
            results["dense"] = bench.measure(bench.model)
            save(results)
        for label, values in ROWS.items():
            for share in SHARES:
                known = results["rows"].setdefault(label, {})
                if only in label and str(share) not in known and time.perf_counter() < stop:
                    known[str(share)] = bench.row(share, values)
                    print(label, share, known[str(share)], flush=True)
                    save(results)
    write_page(results)


def circumstances(bench: Bench) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    return {
        "parameters": sum(parameter.numel() for parameter in bench.model.parameters()),
        "experts": bench.experts,
        "tokens": {name: own.numel() for name, own in bench.windows.items()},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()} CPU, one thread",
    }


def commit() -> str:
    """The state of the tree that a row was measured with."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def save(results: dict[str, Any]) -> None:
    """Write the results, by renaming: an interruption leaves the old file."""
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def write_page(results: dict[str, Any]) -> None:
    """Put the table between the markers of docs/experts.md."""
    rows = []
    for label in ("dense", *ROWS):
        shares = results["rows"].get(label, {})
        row: dict[str, Any] = {"": label}
        for share in SHARES:
            found = results["dense"] if label == "dense" and share == SHARES[0] else shares.get(str(share))
            for name, title in TEXTS.items():
                values = None if found is None else f"{found[name]['perplexity']:.2f} ({found[name]['kl']:.3f})"
                row[f"{100 * share:.0f} %, {title}"] = values or "–"
        if any(value != "–" for name, value in row.items() if name):
            rows.append(row)
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split("<!-- results -->", 1)
    _, after = rest.split("<!-- /results -->", 1)
    PAGE.write_text(f"{before}<!-- results -->\n{markdown_table(rows)}\n<!-- /results -->{after}", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
