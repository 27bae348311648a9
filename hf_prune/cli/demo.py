"""`hf-prune demo`: the whole job on the bundled model: prune, repair, compare, save, reload, generate. No network."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM

from hf_prune.atomic import replaced_file
from hf_prune.checkpoint.saving import check_directory, save_pruned
from hf_prune.cli.printing import print_plan
from hf_prune.config import LLMPrunerConfig, MagnitudeConfig, PruningConfig, RandomConfig, WandaConfig
from hf_prune.data import load_text
from hf_prune.errors import CheckpointError
from hf_prune.evaluation.perplexity import perplexity
from hf_prune.evaluation.speed import num_parameters
from hf_prune.layers.weights import inference
from hf_prune.loading import load_model, load_tokenizer
from hf_prune.pipeline import prune
from hf_prune.reading import save_text_file
from hf_prune.report.pictures import perplexity_picture, widths_picture
from hf_prune.report.tables import comparison_table, markdown_table
from hf_prune.structure.inference import infer_structure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.pipeline import PruningResult

MODEL_DIR = Path(__file__).parents[1] / "demo_model"
RATIOS = (0.2, 0.3, 0.5)
_CALIBRATION = {"num_samples": 32, "seq_len": 256}
RUNS: dict[str, tuple[type[PruningConfig], dict[str, Any]]] = {
    "random": (RandomConfig, {}),
    "magnitude": (MagnitudeConfig, {}),
    "wanda": (WandaConfig, _CALIBRATION),
    "llm_pruner": (LLMPrunerConfig, _CALIBRATION),
    "llm_pruner, repaired": (LLMPrunerConfig, {"repair": "least_squares", "selection": "obs", **_CALIBRATION}),
}
"""Name, configuration class and settings of each line of the table."""
SAVED = ("llm_pruner, repaired", 0.3)
"""The model that is saved, reloaded and used to generate text."""
PROMPT = "The old man looked at the sea and"

Row = dict[str, str | int | float | None]


def run_demo(output: Path, *, model_dir: Path = MODEL_DIR) -> None:
    """Prune the model of `model_dir` in several ways and show what each costs. Writes into `output`.

    Args:
        output: directory for `results.md`, `perplexity.png`, `widths.png` and the checkpoint `pruned/`.
        model_dir: a causal LM with its tokenizer, `calibration.txt` and `evaluation.txt`.

    Raises:
        CheckpointError: the model is not there, or the reloaded model differs from the saved one.
    """
    if not (model_dir / "config.json").is_file():
        raise CheckpointError(f"the demo model is not at {model_dir}; reinstall hf_prune.")
    start = time.perf_counter()
    console = Console(highlight=False)
    dense = load_model(str(model_dir), dtype="float32")
    tokenizer = load_tokenizer(str(model_dir), required=True)
    assert tokenizer is not None
    checkpoint = output / "pruned"
    check_directory(checkpoint.absolute(), dense)
    structure = infer_structure(dense)
    name = f"{type(dense).__name__}, {num_parameters(dense):,} parameters"
    console.print(Text(f"Pruning a small {name} without retraining it.", style="bold"))

    rows, results = _compare(dense, tokenizer, model_dir)
    console.print(comparison_table(rows, title="Perplexity on text that the model was not trained on"))

    output.mkdir(parents=True, exist_ok=True)
    pruned, plan = results[SAVED].model, results[SAVED].plan
    perplexities = {"dense": rows[0]["perplexity"], "pruned": rows[1 + list(results).index(SAVED)]["perplexity"]}
    console.print(Text(f"\nSaved and reloaded: {SAVED[0]}, {SAVED[1]:.0%}", style="bold"))
    print_plan(plan, structure)
    save_pruned(pruned, checkpoint, plan=plan, tokenizer=tokenizer, report={"perplexity": perplexities})
    reloaded = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    _check_equal(pruned, reloaded)
    console.print("AutoModelForCausalLM.from_pretrained gives the same logits, bit for bit.")

    for title, model in (("dense", dense), ("pruned", reloaded)):
        console.print(Text(f"\n{title}: ", style="bold") + Text(_continue(model, tokenizer, PROMPT)))

    save_text_file(output / "results.md", markdown_table(rows))
    written = ["results.md", "pruned/"]
    if find_spec("matplotlib") is not None:
        with replaced_file(output / "perplexity.png") as new:
            perplexity_picture(rows, new)
        with replaced_file(output / "widths.png") as new:
            widths_picture(plan.widths, plan.num_units, new, title=f"What {SAVED[0]} keeps")
        written += ["perplexity.png", "widths.png"]
    console.print(f"\nWritten to {output}: {', '.join(written)} ({time.perf_counter() - start:.0f} s)")


def _compare(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, model_dir: Path
) -> tuple[list[Row], dict[tuple[str, float], PruningResult]]:
    """A row for the dense model and for each method and ratio, and the results by `(name, ratio)`."""
    text, calibration = load_text(model_dir / "evaluation.txt"), str(model_dir / "calibration.txt")
    results: dict[tuple[str, float], PruningResult] = {}
    for name, (config_class, settings) in RUNS.items():
        scores: dict[str, torch.Tensor] | None = None  # one scoring serves every ratio
        for ratio in RATIOS:
            config = config_class(ratio, **settings)
            result = prune(dense, config, tokenizer=tokenizer, calibration=calibration, scores=scores)
            results[name, ratio], scores = result, result.scores

    def row(method: str, asked: float, achieved: float, model: PreTrainedModel) -> Row:
        measured = perplexity(model, tokenizer, text, window=256, progress=False)
        return {
            "method": method,
            "pruning_ratio": asked,
            "achieved_ratio": achieved,
            "num_parameters": num_parameters(model),
            "perplexity": measured.perplexity,
        }

    rows = [row("dense", 0.0, 0.0, dense)]
    rows += [row(*key, found.plan.achieved["decoder"], found.model) for key, found in results.items()]
    return rows, results


def _check_equal(saved: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    ids = torch.arange(64).reshape(2, 32)
    with inference(saved), inference(reloaded):
        if not torch.equal(saved(input_ids=ids).logits, reloaded(input_ids=ids).logits):
            raise CheckpointError("the reloaded model gives other logits than the saved one; please report this.")


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The prompt and 48 greedy tokens, on one line."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
