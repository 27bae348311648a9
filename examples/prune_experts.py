"""Remove whole experts of a mixture: who is sent how much, one score for several ratios, perplexity of each.

python examples/prune_experts.py my-mixture small-mixture --calibration calibration.txt --evaluation evaluation.txt
"""

from pathlib import Path
from typing import Annotated

import typer
from rich import print
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import REAPConfig, perplexity, prune
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.data import load_text
from hf_prune.report.tables import comparison_table

RATIOS = (0.25, 0.5)


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a mixture of experts.")],
    output: Annotated[Path, typer.Argument(help="Where the model at the smaller ratio goes.")],
    calibration: Annotated[str, typer.Option(help="Text to score the experts on: its domain decides what stays.")],
    evaluation: Annotated[str, typer.Option(help="Text to measure perplexity on.")],
    num_samples: Annotated[int, typer.Option(help="Calibration windows of 256 tokens.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens of each window.")] = 256,
) -> None:
    """Score once, remove a quarter and a half of the experts' share, and save the smaller cut."""
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer, text, scores = AutoTokenizer.from_pretrained(model), load_text(evaluation), None
    before = perplexity(dense, tokenizer, text, window=seq_len, progress=False).perplexity
    rows = [{"asked": "dense", "experts": "all", "achieved_ratio": 0.0, "perplexity": before}]
    for ratio in RATIOS:
        # the target `plain` leaves equally many in each layer: config.json says how many, and any loader reads that
        config = REAPConfig(ratio, budget="units", targets=("plain",), num_samples=num_samples, seq_len=seq_len)
        result = prune(dense, config, tokenizer=tokenizer, calibration=calibration, scores=scores)
        scores = result.scores
        kept = {width for name, width in result.plan.widths.items() if name.endswith("experts")}
        after = perplexity(result.model, tokenizer, text, window=seq_len, progress=False).perplexity
        rows.append(
            {
                "asked": f"{ratio:.0%} of the experts",
                "experts": ", ".join(map(str, sorted(kept))),
                "achieved_ratio": result.plan.achieved["decoder"],
                "perplexity": after,
            }
        )
        if ratio == RATIOS[0]:
            save_pruned(result.model, output, tokenizer=tokenizer)
    print(comparison_table(rows))
    print(f"saved: {output}")


if __name__ == "__main__":
    typer.run(main)
