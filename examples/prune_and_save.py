"""Prune a model, save it, load it again, and compare: the shortest complete use of hf_prune.

python examples/prune_and_save.py hf_prune/demo_model pruned --calibration hf_prune/demo_model/calibration.txt \
    --evaluation hf_prune/demo_model/evaluation.txt
"""

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import PrunedModelForCausalLM, WandaConfig, perplexity, prune
from hf_prune.data import load_text


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a causal LM.")],
    output: Annotated[Path, typer.Argument(help="New directory.")],
    calibration: Annotated[str, typer.Option(help="Text to score the units on.")],
    evaluation: Annotated[str, typer.Option(help="Text to measure perplexity on.")],
    pruning_ratio: Annotated[float, typer.Option(help="Fraction of decoder parameters to remove.")] = 0.2,
    num_samples: Annotated[int, typer.Option(help="Calibration windows of 256 tokens.")] = 32,
) -> None:
    """Prune every layer alike, by weight times input norm."""
    dense = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = WandaConfig(pruning_ratio, num_samples=num_samples)
    result = prune(dense, config, tokenizer=tokenizer, calibration=calibration)

    text = load_text(evaluation)
    before = perplexity(dense, tokenizer, text, progress=False).perplexity
    after = perplexity(result.model, tokenizer, text, progress=False).perplexity
    PrunedModelForCausalLM.save_pretrained(
        result.model,
        output,
        plan=result.plan,
        tokenizer=tokenizer,
        report={"perplexity": {"dense": before, "pruned": after}},
    )

    reloaded = AutoModelForCausalLM.from_pretrained(output)
    print(f"asked {pruning_ratio:.1%} of the decoder, removed {result.plan.achieved['decoder']:.1%}")
    print(f"parameters {dense.num_parameters():,} → {reloaded.num_parameters():,}")
    print(f"perplexity {before:.2f} → {after:.2f}")


if __name__ == "__main__":
    typer.run(main)
