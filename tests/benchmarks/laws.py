"""The laws of docs/design.md on thousands of random plans; goes on from docs/laws.json and writes it.

    python tests/benchmarks/laws.py --cases 10000            # all families, from where the last run stopped
    python tests/benchmarks/laws.py --only llama gemma2      # some; other families may run beside it
    python tests/benchmarks/laws.py --only llama --seed 17   # one case again, printed; nothing is written

A case is a plan drawn from (family, seed): random units of random attention, MLP and expert axes, in a third of the
cases without some branches, in a third without some layers. Models are small and random (as in architectures.py), one
per family. Exits with 1 if a law is broken.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from architectures import Float64, logits, plan_of, quiet, random_units, small_model
from tqdm import tqdm

from hf_prune.allocation import allocate
from hf_prune.atomic import replaced_file
from hf_prune.config import RandomConfig
from hf_prune.errors import HFPruneError
from hf_prune.layers.masking import masked
from hf_prune.plan import PruningPlan
from hf_prune.scores import score
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

if TYPE_CHECKING:
    from hf_prune.structure.axes import Structure

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "bloom",
    "falcon",
    "glm4",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
    "llama4_text",
    "gpt_oss",
    "cohere2",
    "starcoder2",
    "minicpm3",
    "bamba",
    "nemotron_h",
    "granite",
]
RESULTS = Path(__file__).parents[2] / "docs" / "laws.json"
TOLERANCE = 1e-9
"""Of the largest logit, in float64."""
EVERY = {"reload": 5, "nested": 2}
"""The slower laws are checked in every n-th case."""


def main() -> int:
    """Check, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000, help="cases in all, over all families and runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; the next run goes on")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--seed", type=int, help="this case alone")
    arguments = parser.parse_args()
    quiet()
    stop = time.perf_counter() + arguments.seconds
    last = -(-arguments.cases // len(FAMILIES))
    results = {family: result for family, result in read().items() if family in arguments.only}
    first = min(result["cases"] for result in results.values())
    models = {family: small_model(family) for family in arguments.only}
    structures = {family: infer_structure(model) for family, model in models.items()}
    gc.freeze()  # models of all families: no need to look at them again and again
    gc.set_threshold(50_000, 20, 50)
    broken = 0
    # Families take turns: a run that is stopped has as many cases of each.
    for seed in tqdm(range(first, last) if arguments.seed is None else [arguments.seed], unit="seed"):
        for family, model in models.items():
            result = results[family]
            if arguments.seed is None and (seed < result["cases"] or time.perf_counter() > stop):
                continue
            began = time.process_time()
            outcomes = case(model, structures[family], family, seed)
            broken += note(result, family, seed, outcomes)
            result["cases"] += 1
            result["seconds"] = round(result["seconds"] + time.process_time() - began, 3)
        if arguments.seed is None:
            write(results)
        if time.perf_counter() > stop:
            break
    if arguments.seed is None:
        write(results)
        every = read().values()
        total = sum(len(result["broken"]) for result in every)
        print(f"{sum(result['cases'] for result in every):,} cases, {total} broken laws")
    return 1 if broken else 0


def note(result: dict[str, Any], family: str, seed: int, outcomes: dict[str, str]) -> int:
    """Count the outcomes of a case; print those that are broken. How many these are."""
    for law, outcome in outcomes.items():
        word = outcome.partition(":")[0]
        counts = result["laws"].setdefault(law, {})
        counts[word] = counts.get(word, 0) + 1
        if word == "broken":
            result["broken"].append({"seed": seed, "law": law, "what": outcome})
            tqdm.write(f"{family}, seed {seed}: {law}: {outcome}")
    return sum(outcome.startswith("broken") for outcome in outcomes.values())


def read() -> dict[str, Any]:
    """What is known of each family."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["families"] if RESULTS.exists() else {}
    return {family: known.get(family, {"cases": 0, "seconds": 0.0, "laws": {}, "broken": []}) for family in FAMILIES}


def write(results: dict[str, Any]) -> None:
    """docs/laws.json and docs/laws.md, with these results in place of earlier ones of their families."""
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    circumstances = {**versions, "python": platform.python_version()}
    families = {**read(), **results}
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    states = {name: count for name, count in before.get("states", {}).items() if name != commit}
    states[commit] = sum(result["cases"] for result in families.values()) - sum(states.values())
    known = {"families": families, "circumstances": circumstances, "states": states}
    for target, text in ((RESULTS, json.dumps(known, indent=1)), (RESULTS.with_suffix(".md"), page(known))):
        with replaced_file(target) as path:
            path.write_text(text + "\n", encoding="utf-8")


LAWS = ("masked = sliced", "layer removal = bypass", "counts", "reload", "nested", "plan = JSON")
_PAGE = """# Laws

Random plans on small random models (hidden size 48, 4 layers) of {families} families: {cases:,} cases, {broken} broken
laws. Written by [`tests/benchmarks/laws.py`](../tests/benchmarks/laws.py). Families take turns, and a run goes on
where the last one stopped (without docs/laws.json: from the start):

    make laws                                                  # until there are 10,000 cases
    python tests/benchmarks/laws.py --only llama --seed 17     # one case again

A case is drawn from (family, seed): random units of random attention, MLP and expert axes; in a third of the
cases some branches go, in a third some layers. **Masked = sliced**, and **layer removal = bypass**: logits of the
pruned model are those of the dense one, in float64, within 1e-9 of the largest. **Counts**: predicted parameters are
the actual ones. **Reload** (every fifth case): saved and loaded, equal tensors and logits. **Nested** (every second): a
larger ratio keeps a subset, the same seed gives the same plan. **Plan = JSON**: a plan read from its file is equal.
Numbers are cases in which a law held; r: refused with an error of ours; b: broken.

transformers {transformers}, torch {torch}, Python {python}; {minutes:.0f} minutes of one core.
State of the code, and cases run with it: {states}.
"""


def page(known: dict[str, Any]) -> str:
    """docs/laws.md."""
    families = known["families"]
    head = _PAGE.format(
        families=len(families),
        cases=sum(result["cases"] for result in families.values()),
        broken=sum(len(result["broken"]) for result in families.values()) or "no",
        states=", ".join(f"{name}: {count:,}" for name, count in known["states"].items() if count),
        minutes=sum(result["seconds"] for result in families.values()) / 60,
        **known["circumstances"],
    )
    rows = [["family", "cases", *LAWS], ["---"] * (len(LAWS) + 2)]
    for family, result in families.items():
        cells = [
            " ".join(f"{count:,}{'' if word == 'holds' else word[0]}" for word, count in sorted(law.items())[::-1])
            or "–"
            for law in (result["laws"].get(name, {}) for name in LAWS)
        ]
        rows.append([family, f"{result['cases']:,}", *cells])
    return head + "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def case(model: Any, structure: Structure, family: str, seed: int) -> dict[str, str]:
    """Outcome by law: "holds", "refused: why" or "broken: how"."""
    outcomes: dict[str, str] = {}

    def law(name: str, check: Any) -> Any:
        try:
            found = check()
        except HFPruneError as error:
            outcomes[name] = f"refused: {error}"
        except AssertionError as error:
            outcomes[name] = f"broken: {error}"
        except Exception:
            outcomes[name] = f"broken: {traceback.format_exc()[-600:]}"
        else:
            outcomes[name] = "holds"
            return found
        return None

    plan = random_plan(structure, family, seed)
    pruned = law("counts", lambda: counted(model, structure, plan))
    if pruned is not None:
        if seed % EVERY["reload"] == 0:
            law("reload", lambda: reloaded(pruned))
        name = "layer removal = bypass" if plan.removed_layers else "masked = sliced"
        law(name, lambda: masked_is_sliced(model, structure, plan, pruned))
    law("plan = JSON", lambda: same(PruningPlan.from_json(plan.to_json()), plan))
    if seed % EVERY["nested"] == 0:
        law("nested", lambda: nested(model, structure, seed))
    return outcomes


def same(found: Any, expected: Any) -> None:
    """Raise unless equal."""
    assert found == expected, f"{found} is not {expected}"


def random_plan(structure: Structure, family: str, seed: int) -> PruningPlan:
    """The plan of a case."""
    rng = random.Random(f"{family} {seed}")
    num_layers = len(structure.layer_paths)
    kept: dict[str, tuple[int, ...]] = {}
    if seed % 3 == 2:
        kept["layers"] = tuple(sorted(rng.sample(range(num_layers), rng.randint(1, num_layers - 1))))
    gone = set(range(num_layers)) - set(kept.get("layers", range(num_layers)))
    without: set[tuple[int | None, str]] = set()
    for branch in ("attention", "mlp") if seed % 3 == 1 else ():
        if structure.axes[f"layers.{branch}"].prunable and rng.random() < 0.7:
            stay = tuple(sorted(rng.sample(range(num_layers), rng.randint(1, num_layers - 1))))
            kept[f"layers.{branch}"] = stay
            without |= {(layer, branch) for layer in range(num_layers) if layer not in stay}
    for name, axis in structure.axes.items():
        units = random_units(axis, rng)
        if axis.branch is None or not axis.prunable or not axis.exact or axis.tied in kept or rng.random() < 0.3:
            continue
        if axis.layer not in gone and (axis.layer, axis.branch) not in without and len(units) < axis.num_units:
            kept[name] = units
    return plan_of(structure, kept)


def counted(model: Any, structure: Structure, plan: PruningPlan) -> Any:
    """Predicted parameters are the actual ones."""
    pruned = apply_plan(model, structure, plan)
    same(sum(parameter.numel() for parameter in pruned.parameters()), plan.num_parameters(structure))
    return pruned


def ids_of() -> torch.Tensor:
    """Two short rows."""
    return torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def masked_is_sliced(model: Any, structure: Structure, plan: PruningPlan, pruned: Any) -> None:
    """The dense model with units masked, branches and layers bypassed has the logits of the pruned one."""
    double = model.double()
    try:
        with Float64():
            with masked(double, structure, plan):
                expected = logits(double, ids_of())
            found = logits(pruned.double(), ids_of())
    finally:
        model.float()
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"logits differ by {error:.1e} of the largest"


def reloaded(pruned: Any) -> None:
    """Saved and loaded, it has the same tensors and logits."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        pruned.save_pretrained(directory)
        again = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation="eager", experts_implementation="batched_mm"
        ).eval()
    before, after = pruned.state_dict(), again.state_dict()
    assert before.keys() == after.keys(), "tensors are missing"
    assert all(torch.equal(before[name], after[name]) for name in before), "tensors differ"
    expected = logits(pruned, ids_of())
    error = ((logits(again, ids_of()) - expected).abs().max() / expected.abs().max()).item()
    assert error <= 1e-5, f"logits differ by {error:.1e} of the largest after loading"


def nested(model: Any, structure: Structure, seed: int) -> None:
    """What a larger ratio keeps, a smaller one keeps too; the same seed gives the same plan."""
    rng = random.Random(seed)
    allocation = rng.choice(["uniform", "global"])
    plans = []
    for ratio in sorted(rng.uniform(0.05, 0.7) for _ in range(2)):
        config = RandomConfig(ratio, seed=seed, allocation=allocation)
        plans.append(allocate(score(model, structure, config), structure, config))
        same(allocate(score(model, structure, config), structure, config), plans[-1])
    for name, units in plans[0].kept_indices.items():
        larger = plans[1].kept_indices.get(name, range(structure.axes[name].num_units))
        assert set(larger) <= set(units), f"{name} is not nested"


if __name__ == "__main__":
    sys.exit(main())
