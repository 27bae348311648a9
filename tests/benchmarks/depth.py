"""Remove the first, a middle and the last layer of every causal LM type of transformers; write docs/depth.json.

Each model is compared in numbers with the dense one whose layer is bypassed, before and after saving and loading. Small
random models, as in architectures.py.

python tests/benchmarks/depth.py                  # all types
python tests/benchmarks/depth.py --only llama opt # some, printed; the documents stay as they are
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from architectures import TIME_CAP_S, Float64, logits, plan_of, quiet, small_model, time_cap
from tqdm import tqdm

from hf_prune.errors import HFPruneError
from hf_prune.layers.masking import masked
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

if TYPE_CHECKING:
    from hf_prune.structure.axes import Structure

DOCS = Path(__file__).parents[2] / "docs"
TOLERANCE = 1e-9
"""Of the largest logit, in float64; after loading, in float32, 1e-5."""


def main() -> None:
    """Check, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="check these model types, print, write nothing")
    parser.add_argument("--write", action="store_true", help="write those of --only into the documents")
    parser.add_argument("--part", default="0/1", help="every n-th type from the k-th: k/n; results of parts are joined")
    arguments = parser.parse_args()
    quiet()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    part, parts = map(int, arguments.part.split("/"))
    names = arguments.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[part::parts]
    results = {}
    for name in tqdm(names, disable=arguments.only is not None):
        results[name] = check(name)
        if arguments.only:
            print(name, json.dumps(results[name], ensure_ascii=False), flush=True)
    if arguments.write or not arguments.only:
        path = DOCS / "depth.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known.update(results)
        known = dict(sorted(known.items()))
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(page(known) + "\n", encoding="utf-8")
        print(summary(known))


_PAGE = """# Layers and depth

The first, a middle and the last layer removed from every causal LM type that transformers registers ({types} types,
small random models of 4 layers), compared in numbers with the dense model whose layer is bypassed: in float64 within
1e-9 of the largest logit, and after saving and loading. Written by
[`tests/benchmarks/depth.py`](../tests/benchmarks/depth.py): {counts}.

Models not listed have equal numbers with a plain config, whichever layer goes. *As built*: equal, and each layer is
built with its index in the dense model, because its constants depend on it ([design](design.md)).

| model type | layer | outcome | cause |
|---|---|---|---|
"""


def page(results: dict[str, Any]) -> str:
    """docs/depth.md."""
    rows = []
    for name, result in results.items():
        if "error" in result:
            rows.append((name, "", "cannot be pruned at all", result["error"]))
        by_outcome: dict[tuple[str, str], list[str]] = {}
        for layer, found in result["removed"].items():
            if found["outcome"] != "equal" or found["how"] != "plain config":
                outcome = "as built" if found["outcome"] == "equal" else found["outcome"]
                cause = found.get("reason", "").replace(f"layers [{layer}]", "the layer")
                by_outcome.setdefault((outcome, cause), []).append(layer)
        rows += [(name, ", ".join(layers), *key) for key, layers in by_outcome.items()]
    counts = ", ".join(f"{count} {outcome}" for outcome, count in summary(results).items())
    lines = ("| " + " | ".join(" ".join(cell.split()).replace("|", "/") for cell in row) + " |" for row in rows)
    return _PAGE.format(types=len(results), counts=counts) + "\n".join(lines)


def summary(results: dict[str, Any]) -> dict[str, int]:
    """Removals by outcome."""
    counts: dict[str, int] = {}
    for result in results.values():
        for found in result.get("removed", {}).values():
            counts[found["outcome"]] = counts.get(found["outcome"], 0) + 1
        if "error" in result:
            counts["cannot be pruned at all"] = counts.get("cannot be pruned at all", 0) + 1
    return counts


def check(model_type: str) -> dict[str, Any]:
    """What becomes of each removed layer: equal, refused (and why) or wrong."""
    result: dict[str, Any] = {"removed": {}}
    start = time.perf_counter()
    try:
        with time_cap(TIME_CAP_S):
            model = small_model(model_type)
            structure = infer_structure(model)
            count = len(structure.layer_paths)
            for layer in sorted({0, count // 2, count - 1}):
                result["removed"][str(layer)] = removed(model, structure, layer)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"[:300]
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def removed(model: Any, structure: Structure, layer: int) -> dict[str, Any]:
    """Remove one layer and compare."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    ids = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    plan = plan_of(structure, {"layers": tuple(i for i in range(len(structure.layer_paths)) if i != layer)})
    try:
        small = apply_plan(model, structure, plan)
    except HFPruneError as error:
        return {"outcome": "refused", "reason": str(error)}
    surgery = small.config.pruning_config.get("surgery", {})
    how = "as built" if "layers" in surgery else "plain config"
    with tempfile.TemporaryDirectory() as directory:
        small.save_pretrained(directory)
        chosen = type(small.config) in MODEL_FOR_CAUSAL_LM_MAPPING  # by the auto class: not text parts of larger models
        loaded = (
            (AutoModelForCausalLM if chosen else type(small))
            .from_pretrained(directory, attn_implementation="eager", experts_implementation="batched_mm")
            .eval()
        )
    of_small, of_loaded = logits(small, ids), logits(loaded, ids)
    reload = ((of_small - of_loaded).abs().max() / of_small.abs().max()).item()
    dense, double = logits(model, ids), model.double()
    with Float64():
        with masked(double, structure, plan):
            expected = logits(double, ids)
        found = logits(small.double(), ids)
    model.float()
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    effect = ((dense - of_small).abs().max() / dense.abs().max()).item()
    outcome = "equal" if error <= TOLERANCE and reload <= 1e-5 else "wrong"
    return {"outcome": outcome, "how": how, "error": error, "reload": reload, "effect": effect}


if __name__ == "__main__":
    sys.exit(main())
