"""PruneNet on ref10m: does the policy learn, and what does it keep of the model?

    python tests/benchmarks/prunenet.py reward               # learned > row norms > random, per seed
    python tests/benchmarks/prunenet.py perplexity           # beside random rows and row norms at the same budget
    python tests/benchmarks/prunenet.py reuse                # a policy trained at 40 % used at 20 and 30 %

Results are added to docs/prunenet.json; cells that it holds are not measured again.
"""

import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import PruneNetConfig, PruningConfig, allocate, apply_plan, infer_structure, perplexity
from hf_prune.data import load_text
from hf_prune.layers.walk import Walk
from hf_prune.scores import score
from hf_prune.scores.prunenet import train_policy
from hf_prune.scores.prunenet.layer_importance import layer_importance
from hf_prune.scores.prunenet.scoring import marginal_losses, units_ratio
from hf_prune.scores.prunenet.spectra import Spectrum
from hf_prune.scores.prunenet.training import features_of, kept_count, train
from hf_prune.scores.prunenet.unit_matrix import UnitMatrix, unit_matrix

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("HF_PRUNE_DATA", ROOT.parent / "shared"))
RESULTS = ROOT / "docs" / "prunenet.json"
SEEDS = (0, 1, 2, 3, 4)
MLP = ("mlp",)
REWARDS: dict[str, dict[str, Any]] = {
    "gate, KS": {"state": "gate", "distance": "ks"},
    "gate, KS, probe of raw rows": {
        "state": "gate",
        "distance": "ks",
        "features": "row",
        "start": "zero",
        "learning_rate": 0.01,
    },
    "write, Wasserstein": {"state": "write", "distance": "wasserstein"},
}
app = typer.Typer(add_completion=False)
torch.set_num_threads(1)


def ref10m() -> tuple[Any, Any, Any]:
    """Model, tokenizer, structure."""
    path = SHARED / "models" / "ref10m"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path), infer_structure(model)


def load_results() -> dict[str, Any]:
    """What was measured before."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def add_result(section: str, key: str, value: Any) -> None:
    """Write one result, by renaming."""
    results = load_results()
    results.setdefault(section, {})[key] = value
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)
    print(section, key, json.dumps(value)[:300], flush=True)


def random_layers(num_layers: int = 4, num_units: int = 512, width: int = 128) -> dict[str, UnitMatrix]:
    """Gaussian rows whose norms are log-normal (σ = 0.5)."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for layer in range(num_layers):
        scale = (0.5 * torch.randn(num_units, 1, 1, generator=generator)).exp()
        rows = torch.randn(num_units, 1, width, generator=generator) * scale
        layers[str(layer)] = UnitMatrix(rows, rows.norm(dim=(1, 2)), rows.norm(dim=(1, 2)))
    return layers


def model_layers(state: str) -> dict[str, UnitMatrix]:
    """The MLPs of ref10m."""
    model, _, structure = ref10m()
    read = dict(model.named_parameters(remove_duplicate=False)).__getitem__
    return {axis.name: unit_matrix(read, structure, axis, state) for axis in structure.axes_of("mlp")}


def rewards_of(
    layers: dict[str, UnitMatrix], orders: dict[str, torch.Tensor], spectra: dict[str, Spectrum]
) -> list[float]:
    """Minus the distance of each layer at half of its units."""
    found = []
    for name, order in orders.items():
        mask = torch.zeros(1, len(order), dtype=torch.bool)
        mask[0, order[: kept_count(len(order), 0.5)]] = True
        found.append(-float(spectra[name].losses(mask)[0]))
    return found


@app.command()
def reward(seeds: int = len(SEEDS), only: str = ";".join(REWARDS)) -> None:
    """Reward at 50 % of the channels: mean over layers, learned policy, row norms, random rows."""
    for source in ("random matrices", "ref10m"):
        for name in only.split(";"):
            setting = REWARDS[name]
            config = PruneNetConfig(0.5, budget="units", **setting)
            layers = random_layers() if source != "ref10m" else model_layers(config.state)
            depths = {key: i / (len(layers) - 1) for i, key in enumerate(layers)}
            spectra = {key: Spectrum(rows.state, config.distance, config.exact_up_to) for key, rows in layers.items()}
            norms = {key: rows.state.norm(dim=(1, 2)).argsort(descending=True) for key, rows in layers.items()}
            row_norm = rewards_of(layers, norms, spectra)
            result: dict[str, Any] = {"row_norm": row_norm, "learned": [], "random": [], "curves": []}
            if f"{source}: {name}" in load_results().get("reward", {}):
                continue
            for seed in range(seeds):
                generator = torch.Generator().manual_seed(seed)
                policy = train(layers.__getitem__, depths, dict.fromkeys(depths, 1.0), config, 0.5, generator)
                logits = {k: policy.logits(features_of(rows, config.features, depths[k])) for k, rows in layers.items()}
                orders = {k: v.argsort(descending=True, stable=True) for k, v in logits.items()}
                result["learned"].append(rewards_of(layers, orders, spectra))
                shuffled = {k: torch.randperm(len(v), generator=generator) for k, v in logits.items()}
                result["random"].append(rewards_of(layers, shuffled, spectra))
                result["curves"].append([round(row["best"], 5) for row in policy.history])
            for kind in ("learned", "random"):
                means = [statistics.fmean(found) for found in result[kind]]
                result[f"{kind}_mean"], result[f"{kind}_sd"] = statistics.fmean(means), statistics.stdev(means)
                result[f"{kind}_by_seed"] = means
            result["row_norm_mean"] = statistics.fmean(row_norm)
            result["layers_below_row_norm"] = [
                sum(a < b for a, b in zip(found, row_norm, strict=True)) for found in result["learned"]
            ]
            add_result("reward", f"{source}: {name}", result)


def scores_by_norms(model: Any, structure: Any, kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random scores, or norms of the gate's rows, or of the whole group."""
    read = dict(model.named_parameters(remove_duplicate=False)).__getitem__
    generator = torch.Generator().manual_seed(seed)
    scores = {}
    for axis in structure.axes_of("mlp"):
        if kind == "random":
            scores[axis.name] = torch.rand(axis.num_units, generator=generator)
        else:
            scores[axis.name] = unit_matrix(read, structure, axis, kind).state.norm(dim=(1, 2))
    return scores


def norms_with_our_widths(model: Any, structure: Any, ratio: float) -> dict[str, torch.Tensor]:
    """Row norms of the group decide inside of a layer, the reward of the default setting how much each layer loses."""
    config = PruneNetConfig(ratio)
    axes = structure.axes_of("mlp")
    shares = layer_importance(
        Walk(model, structure.layer_paths), structure, axes, torch.Generator().manual_seed(config.seed)
    )
    read = dict(model.named_parameters(remove_duplicate=False)).__getitem__
    scores = {}
    for axis in axes:
        order = unit_matrix(read, structure, axis, "group").state.norm(dim=(1, 2)).argsort(descending=True)
        spectrum = Spectrum(unit_matrix(read, structure, axis, config.state).state, config.distance, config.exact_up_to)
        scores[axis.name] = shares[axis.name] * marginal_losses(spectrum, order)
    return scores


def cell_scores(model: Any, structure: Any, kind: str, ratio: float) -> tuple[dict[str, torch.Tensor], PruningConfig]:
    """Scores of one row of the table and the configuration that allocates them."""
    uniform = PruningConfig(ratio, axes=MLP)
    if kind.startswith("random"):
        return scores_by_norms(model, structure, "random", int(kind[-1])), uniform
    if kind.startswith("row norm, ") and kind != "row norm, group, widths by the reward":
        return scores_by_norms(model, structure, kind.removeprefix("row norm, ")), uniform
    if kind.startswith("row norm"):
        return norms_with_our_widths(model, structure, ratio), PruningConfig(ratio, axes=MLP, allocation="global")
    settings: dict[str, dict[str, Any]] = {
        "learned, default": {},
        "learned, uniform": {"allocation": "uniform"},
        "learned, gate, KS, uniform": {"allocation": "uniform", "state": "gate", "distance": "ks"},
        "paper": {
            "allocation": "uniform",
            "state": "gate",
            "distance": "ks",
            "features": "row",
            "start": "zero",
            "layer_weight": "equal",
            "discount": 0.99,
            "num_episodes": 20,
            "learning_rate": 1e-3,
            "seed": 42,
        },
    }
    config = PruneNetConfig(ratio, **settings[kind])
    return score(model, structure, config), config


CELLS = (
    "learned, default",
    "row norm, group",
    "row norm, gate",
    "learned, uniform",
    "row norm, group, widths by the reward",
    "random 0",
    "random 1",
    "random 2",
    "paper",
    "learned, gate, KS, uniform",
)


@app.command("perplexity")
def measure_perplexity(
    text: Annotated[str, typer.Option(help="test, valid or novels")] = "test",
    kinds: Annotated[str, typer.Option(help="Rows of the table, separated by ;")] = ";".join(CELLS),
    ratios: str = "0.2,0.3,0.5,0.7",
    max_chars: Annotated[int, typer.Option(help="Of the text; 0: all.")] = 0,
) -> None:
    """Perplexity at ratios of the decoder's parameters, all of it MLP channels. Decisions use valid only."""
    model, tokenizer, structure = ref10m()
    path = {"novels": "prose/novels.txt"}.get(text, f"wikitext2/{text}.txt")
    max_chars = max_chars or (400_000 if text == "novels" else 0)
    content = load_text(SHARED / "data" / path, max_chars=max_chars or None)
    for kind in kinds.split(";"):
        for ratio in map(float, ratios.split(",")):
            key = f"{kind} @ {ratio}" + (f" first {max_chars}" if text == "valid" and max_chars else "")
            if key in load_results().get(text, {}):
                continue
            scores, config = cell_scores(model, structure, kind, ratio)
            plan = allocate(scores, structure, config)
            pruned = apply_plan(model, structure, plan)
            report = perplexity(pruned, tokenizer, content, window=256, batch_size=4, progress=False)
            widths = [plan.widths[axis.name] for axis in structure.axes_of("mlp")]
            add_result(
                text, key, {"perplexity": report.perplexity, "decoder": plan.achieved["decoder"], "widths": widths}
            )


@app.command()
def reuse() -> None:
    """Rewards at 20 and 30 % of the channels: a policy trained at 40 % against one trained there, and perplexities."""
    model, tokenizer, structure = ref10m()
    content = load_text(SHARED / "data" / "wikitext2" / "valid.txt", max_chars=100_000)
    with tempfile.TemporaryDirectory() as directory:
        train_policy(
            Walk(model, structure.layer_paths),
            structure,
            PruneNetConfig(0.4, budget="units"),
            torch.Generator().manual_seed(0),
        ).save(directory)
        for ratio in (0.2, 0.3):
            values = {}
            for name, policy in (("reused", directory), ("trained there", None)):
                config = PruneNetConfig(ratio, budget="units", policy=policy)
                plan = allocate(score(model, structure, config), structure, config)
                report = perplexity(
                    apply_plan(model, structure, plan), tokenizer, content, window=256, batch_size=4, progress=False
                )
                values[name] = report.perplexity
                values[f"{name}, removed"] = plan.achieved["units"]
            values["units_ratio"] = units_ratio(structure, config, structure.axes_of("mlp"))
            add_result("reuse", f"{ratio} of channels, first 100,000 characters of valid", values)


if __name__ == "__main__":
    app()
