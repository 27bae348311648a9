"""Let all layers compete: one scoring, several ratios, and what each layer keeps.

python examples/prune_global.py hf_prune/demo_model --calibration hf_prune/demo_model/calibration.txt \
    --evaluation hf_prune/demo_model/evaluation.txt --picture widths.png
"""

from pathlib import Path
from typing import Annotated

import typer
from rich import print
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import WandaConfig, allocate, apply_plan, perplexity, prune
from hf_prune.data import load_text
from hf_prune.report.pictures import widths_picture
from hf_prune.report.tables import comparison_table

RATIOS = (0.2, 0.3, 0.4, 0.5)


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a causal LM.")],
    calibration: Annotated[str, typer.Option(help="Text to score the units on.")],
    evaluation: Annotated[str, typer.Option(help="Text to measure perplexity on.")],
    picture: Annotated[Path, typer.Option(help="Where to draw the widths at the largest ratio.")] = Path("widths.png"),
    num_samples: Annotated[int, typer.Option(help="Calibration windows of 256 tokens.")] = 32,
) -> None:
    """Compare uniform and global allocation, with the same scores."""
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer, text = AutoTokenizer.from_pretrained(model), load_text(evaluation)
    first = prune(dense, WandaConfig(RATIOS[0], num_samples=num_samples), tokenizer=tokenizer, calibration=calibration)
    rows = [{"allocation": "dense", "achieved_ratio": 0.0, "perplexity": _measure(dense, tokenizer, text)}]
    for ratio in RATIOS:
        for allocation in ("uniform", "global"):
            config = WandaConfig(ratio, allocation=allocation, num_samples=num_samples)
            plan = allocate(first.scores, first.structure, config)  # no new scoring
            pruned = apply_plan(dense, first.structure, plan)
            measured = _measure(pruned, tokenizer, text)
            rows.append({"allocation": allocation, "achieved_ratio": plan.achieved["decoder"], "perplexity": measured})
    print(comparison_table(rows))
    widths_picture(plan.widths, plan.num_units, picture, title=f"Global allocation, {RATIOS[-1]:.0%} removed")
    print(f"drawn: {picture}")


def _measure(model, tokenizer, text: str) -> float:
    return perplexity(model, tokenizer, text, progress=False).perplexity


if __name__ == "__main__":
    typer.run(main)
