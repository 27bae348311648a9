"""Policy-gradient masks on the reference model: quality at 20 / 30 / 50 / 70 %, and variance of the estimators.

    python tests/benchmarks/policy_gradient.py quality     # measure what is missing, then print the table
    python tests/benchmarks/policy_gradient.py table
    python tests/benchmarks/policy_gradient.py variance

Quality: perplexity of ref10m on the WikiText-2 test file and on novels (protocol of docs/results.md), beside the
initialisation alone, and beside the released code at equal token-forwards. Settings were chosen on validation text.
Each row is written to docs/policy_gradient.json as it is measured, and learning itself resumes from its state
directory: an interrupted run goes on. Data and model are read from `HF_PRUNE_DATA` (default `../shared`).
"""

import json
import os
import tempfile
import time
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_prune import PolicyGradientConfig, PruningConfig, Structure, allocate, apply_plan, infer_structure
from hf_prune.data import load_text
from hf_prune.evaluation import num_parameters, perplexity
from hf_prune.layers.walk import Walk
from hf_prune.pipeline import calibration_data
from hf_prune.report.tables import markdown_table
from hf_prune.scores.policy_gradient import as_scores, estimators, initial_scores, learn_policy
from hf_prune.scores.policy_gradient.forward import open_model
from hf_prune.scores.policy_gradient.policy import find_units, initial_widths, soft_profile

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("HF_PRUNE_DATA", ROOT.parent / "shared"))
RESULTS = ROOT / "docs" / "policy_gradient.json"
STATES = Path(tempfile.gettempdir()) / "hf_prune_policy_gradient"
NOVELS_CHARS = 400_000

Cell = tuple[str, str, float, int, float]
"""init, policy, pruning ratio, seed, million token-forwards."""
KEY = ("init", "policy", "pruning_ratio", "seed", "million_tokens")
RATIOS = (0.2, 0.3, 0.5, 0.7)
CELLS: list[Cell] = [
    *(("wanda", "widths", ratio, 0, 0.25) for ratio in (0.5, 0.3, 0.2)),
    *(("wanda", "start", ratio, 0, 0.0) for ratio in (0.5, 0.3, 0.2)),
    *(("wanda", "widths", ratio, seed, 0.25) for seed, ratio in product((1, 2), (0.5, 0.3, 0.2))),
    *(("llm_pruner", "start", ratio, 0, 0.0) for ratio in (0.5, 0.3)),
    *(("llm_pruner", "widths", ratio, 0, 0.25) for ratio in (0.5, 0.3)),
    *(("wanda", "widths", 0.7, seed, 0.25) for seed in range(3)),
    ("wanda", "start", 0.7, 0, 0.0),
    *(
        ("random", policy, 0.5, seed, 0.25 * (policy == "widths"))
        for seed in range(3)
        for policy in ("start", "widths")
    ),
    *(("wanda", "widths", ratio, 0, 2.05) for ratio in (0.5, 0.3)),
    *(("wanda", "widths_then_units", ratio, 0, 4.1) for ratio in (0.5, 0.3)),
]
RELEASED = {
    "policy gradient, released code: initialisation only": {0.2: 47.17, 0.3: 54.44, 0.5: 98.76},
    "policy gradient, released code: 1.0 M token-forwards": {0.2: 44.86, 0.3: 52.21, 0.5: 80.88},
    "policy gradient, released code: 4.1 M token-forwards": {0.3: 47.50, 0.5: 73.43},
}
"""WikiText-2 test perplexity of the released code driven on ref10m, 2 masks × 8 × 128 tokens per step."""
app = typer.Typer(add_completion=False)


@cache
def dense_model() -> tuple[PreTrainedModel, Any, Structure]:
    """The reference model, its tokenizer and its structure."""
    torch.set_num_threads(1)
    path = SHARED / "models" / "ref10m"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path), infer_structure(model)


@cache
def texts() -> dict[str, str]:
    """The two evaluation texts."""
    data = SHARED / "data"
    novels = load_text(data / "prose" / "novels.txt", max_chars=NOVELS_CHARS)
    return {"wikitext2": load_text(data / "wikitext2" / "test.txt"), "novels": novels}


def windows_of(config: PruningConfig) -> Any:
    """Calibration batches."""
    return calibration_data(config, dense_model()[1], str(SHARED / "data" / "wikitext2" / "train.txt"), batch_size=8)


def settings(cell: Cell, state_dir: str | None = None) -> PolicyGradientConfig:
    """The configuration of a cell: defaults, with as many steps as its token-forwards pay for."""
    init, policy, ratio, seed, millions = cell
    chosen: Any = {"init": init, "policy": "widths" if policy == "start" else policy, "seed": seed}
    if init == "llm_pruner":
        chosen["init_widths"] = "global"
    config = PolicyGradientConfig(ratio, **chosen, state_dir=state_dir)
    rows = config.windows_per_step * (config.num_masks + (config.reward == "kl"))
    steps = max(1, round(millions * 1e6 / (rows * config.seq_len)))
    return PolicyGradientConfig(ratio, **chosen, policy_steps=steps, state_dir=state_dir)


@cache
def start_scores(init: str, seed: int) -> dict[str, torch.Tensor]:
    """Initial scores do not depend on the ratio."""
    model, _, structure = dense_model()
    config = PolicyGradientConfig(0.5, init=init, seed=seed)  # type: ignore[arg-type]
    return initial_scores(Walk(model, structure.layer_paths, windows_of(config)), structure, config)


def measure(cell: Cell) -> dict[str, Any]:
    """Learn, prune, and measure perplexities."""
    model, tokenizer, structure = dense_model()
    name = "-".join(str(value) for value in cell)
    config = settings(cell, None if cell[1] == "start" else str(STATES / name))
    scores, began = start_scores(config.init, config.seed), time.perf_counter()
    if cell[1] == "start":
        units = find_units(structure, config, torch.device("cpu"))
        probs = soft_profile(units, initial_widths(units, scores, config), units.ranks(scores), 0.25)
        learned_by, history = 0, []
    else:
        generator = torch.Generator().manual_seed(config.seed)
        learned = learn_policy(
            Walk(model, structure.layer_paths, windows_of(config)), structure, config, scores, generator
        )
        units, probs, history = learned.units, learned.keep_probs, learned.history
        learned_by = int(history[-1]["token_forwards"])
    seconds = time.perf_counter() - began
    plan = allocate(as_scores(units, probs), structure, config)
    pruned = apply_plan(model, structure, plan)
    row = dict(zip(KEY, cell, strict=True)) | {
        "token_forwards": learned_by,
        "achieved": plan.achieved,
        "widths": plan.widths,
        "num_parameters": num_parameters(pruned),
        "wall_s": round(seconds, 1),
        "curve": [
            [row["token_forwards"], round(float(row["loss"]), 4)] for row in history[:: max(1, len(history) // 50)]
        ],
    }
    for corpus, text in texts().items():
        row[corpus] = perplexity(pruned, tokenizer, text, window=256, batch_size=4, progress=False).perplexity
    return row


def load() -> dict[str, Any]:
    """What was measured so far."""
    if RESULTS.exists():
        found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
        return found
    return {"model": "ref10m", "calibration": "1024 × 128 tokens of wikitext2/train.txt", "rows": []}


def save(results: dict[str, Any]) -> None:
    """Write, by renaming."""
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def missing(results: dict[str, Any]) -> list[Cell]:
    """Cells that are not measured yet, in the order of their worth."""
    done = {tuple(row[name] for name in KEY) for row in results["rows"]}
    return [cell for cell in CELLS if cell not in done]


def quality_table(results: dict[str, Any], corpus: str) -> str:
    """One line per start and amount of learning, one column per ratio: mean, smallest and largest of the seeds."""
    lines = []
    for released, values in RELEASED.items() if corpus == "wikitext2" else ():
        lines.append({"": released, **{f"{100 * r:.0f} %": f"{values[r]:.2f}" if r in values else "–" for r in RATIOS}})
    kinds = dict.fromkeys((row["init"], row["policy"], row["million_tokens"]) for row in results["rows"])
    for init, policy, millions in sorted(kinds, key=lambda kind: (kind[0], kind[2])):
        what = "without learning" if policy == "start" else f"{policy}, {millions} M token-forwards"
        line = {"": f"ours, from {init}: {what}"}
        for ratio in RATIOS:
            found = [
                row[corpus]
                for row in results["rows"]
                if (row["init"], row["policy"], row["million_tokens"], row["pruning_ratio"])
                == (init, policy, millions, ratio)
            ]
            spread = f" ({min(found):,.2f}–{max(found):,.2f})" if len(found) > 1 else ""
            line[f"{100 * ratio:.0f} %"] = f"{fmean(found):,.2f}{spread}" if found else "–"
        lines.append(line)
    return markdown_table(lines) if lines else ""


def show(results: dict[str, Any]) -> None:
    """Print the tables."""
    for corpus in ("wikitext2", "novels"):
        print(f"\n{corpus}\n\n{quality_table(results, corpus)}")
    print(f"{len(results['rows'])} of {len(CELLS)} cells measured; {len(missing(results))} to do.")


@app.command()
def quality(limit: Annotated[int, typer.Option(help="Measure so many cells at most.")] = 1000) -> None:
    """Measure what docs/policy_gradient.json does not hold yet, one cell after another."""
    results = load()
    for cell in missing(results)[:limit]:
        print("measuring", cell, flush=True)
        results["rows"].append(measure(cell))
        save(results)
        row = results["rows"][-1]
        print(f"{cell}: wikitext2 {row['wikitext2']:.2f}, novels {row['novels']:.2f}, {row['wall_s']} s", flush=True)
    show(results)


@app.command()
def table() -> None:
    """Print the tables of what was measured."""
    show(load())


@app.command()
def variance(
    ratio: float = 0.3, steps: Annotated[int, typer.Option(help="Estimates of each kind.")] = 40, seed: int = 0
) -> None:
    """Variance of the gradient by the keep-probabilities, each estimate from 16 masked windows of 128 tokens.

    All at the same policy (Wanda order, uniform widths, soft over 5 % of the axis), mean over the units that are open
    (s between 0.05 and 0.95), relative to the released code's setting: 2 masks on 8 windows, moving-average baseline.
    """
    model, _, structure = dense_model()
    config = PolicyGradientConfig(ratio)
    windows = torch.cat([batch["input_ids"] for batch in windows_of(config)])
    units = find_units(structure, config, torch.device("cpu"))
    scores = start_scores("wanda", 0)
    s = soft_profile(units, initial_widths(units, scores, config), units.ranks(scores), 0.05).clamp(0.02, 0.98)
    usable = (s > 0.05) & (s < 0.95)
    lines: list[dict[str, Any]] = []
    for reward in ("lm", "kl"):
        with open_model(Walk(model, structure.layer_paths), structure, units, reward=reward) as masked:  # type: ignore[arg-type]
            for estimator, num_masks, per_mask in (
                ("paper", 2, 8),
                ("leave_one_out", 2, 8),
                ("leave_one_out", 2, 1),
                ("leave_one_out", 4, 1),
                ("disarm", 2, 1),
                ("arm", 2, 1),
            ):
                generator = torch.Generator().manual_seed(seed)
                found, recent = [], []
                for step in range(steps):
                    own = windows[torch.arange(16 // num_masks) + step * 16 % (len(windows) - 16)]
                    groups = len(own) // per_mask
                    masks, uniforms = estimators.sample(s, groups, num_masks, "arm" in estimator, generator)
                    losses = masked.losses(own, masks, per_mask)
                    if estimator == "paper":
                        if len(recent) >= 5:
                            found.append(estimators.paper(losses, masks, s, torch.stack(recent[-5:]).mean()))
                        recent.append(losses.mean())
                    elif estimator == "arm":
                        found.append(estimators.arm(losses, uniforms, s))
                    else:
                        found.append(getattr(estimators, estimator)(losses, masks, s))
                lines.append(
                    {
                        "reward": reward,
                        "estimator": estimator,
                        "masks × windows": f"{num_masks} × {16 // num_masks}, {per_mask} a mask",
                        "variance": float(torch.stack(found)[:, usable].var(0).mean()),
                    }
                )
                print(lines[-1], flush=True)
    base = lines[0]["variance"]
    print(markdown_table([line | {"variance": f"{line['variance'] / base:.4f}"} for line in lines]))


if __name__ == "__main__":
    app()
