"""Prune a model and train what is left to predict what the dense model does.

python examples/distillation.py hf_prune/demo_model small --train hf_prune/demo_model/calibration.txt \
    --evaluation hf_prune/demo_model/evaluation.txt --steps 40
"""

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

from hf_prune import DistillationTrainer, DivergenceGuard, LLMPrunerConfig, PrunedModelForCausalLM, perplexity, prune
from hf_prune.calibration import training_windows
from hf_prune.data import load_text


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a causal LM.")],
    output: Annotated[Path, typer.Argument(help="New directory for the small model.")],
    train: Annotated[str, typer.Option(help="Text to score units on and to train on.")],
    evaluation: Annotated[str, typer.Option(help="Text to measure perplexity on.")],
    pruning_ratio: Annotated[float, typer.Option(help="Fraction of decoder parameters to remove.")] = 0.3,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 300,
    seq_len: Annotated[int, typer.Option(help="Tokens of each window.")] = 256,
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
) -> None:
    """`hf_prune.recover(..., teacher=model)` is shorter; here the Trainer is in your hands."""
    dense = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = LLMPrunerConfig(pruning_ratio, num_samples=num_samples, seq_len=seq_len)
    result = prune(dense, config, tokenizer=tokenizer, calibration=train)
    text = load_text(evaluation)
    before = perplexity(result.model, tokenizer, text, window=seq_len, progress=False).perplexity

    trainer = DistillationTrainer(
        result.model,
        TrainingArguments(
            output_dir=f"{output}-training",
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-4,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in training_windows(tokenizer, train, seq_len)],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[DivergenceGuard()],
        teacher=dense,
        temperature=2.0,
        alpha=0.5,
        hidden_weight=0.1,
    )
    trainer.train()

    after = perplexity(trainer.model, tokenizer, text, window=seq_len, progress=False).perplexity
    report = {"perplexity": {"pruned": before, "distilled": after}}
    PrunedModelForCausalLM.save_pretrained(trainer.model, output, tokenizer=tokenizer, report=report)
    print(f"parameters {dense.num_parameters():,} → {trainer.model.num_parameters():,}")
    print(f"perplexity {before:.2f} → {after:.2f}")


if __name__ == "__main__":
    typer.run(main)
