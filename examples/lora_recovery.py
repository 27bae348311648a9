"""Prune a model, train LoRA adapters by LLM-Pruner's recipe, merge them, and compare.

python examples/lora_recovery.py hf_prune/demo_model recovered --train hf_prune/demo_model/calibration.txt \
    --evaluation hf_prune/demo_model/evaluation.txt --steps 20
"""

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import LLMPrunerConfig, prune, recover


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a causal LM.")],
    output: Annotated[Path, typer.Argument(help="New directory; checkpoints go beside it.")],
    train: Annotated[str, typer.Option(help="Text to score units on and to train on.")],
    evaluation: Annotated[str, typer.Option(help="Text to choose the best checkpoint by.")],
    pruning_ratio: Annotated[float, typer.Option(help="Fraction of decoder parameters to remove.")] = 0.3,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 300,
    seq_len: Annotated[int, typer.Option(help="Tokens of each window.")] = 256,
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
) -> None:
    """Prune, then train 64 windows a step; every option of TrainingArguments could be passed on to `recover`."""
    dense = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = LLMPrunerConfig(pruning_ratio, num_samples=num_samples, seq_len=seq_len)
    pruned = prune(dense, config, tokenizer=tokenizer, calibration=train).model

    result = recover(
        pruned, output, train=train, eval=evaluation, tokenizer=tokenizer, steps=steps, seq_len=seq_len, resume=True
    )

    reloaded = AutoModelForCausalLM.from_pretrained(output)
    print(f"parameters {dense.num_parameters():,} → {reloaded.num_parameters():,}")
    print(f"perplexity {result.perplexity_before:.2f} → {result.perplexity_after:.2f}")


if __name__ == "__main__":
    typer.run(main)
