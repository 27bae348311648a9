"""Prune while training, with an ordinary Trainer: units are masked on a cubic schedule, and sliced at the end.

python examples/gradual_pruning.py hf_prune/demo_model small --train hf_prune/demo_model/calibration.txt --steps 40
"""

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from hf_prune import LLMPrunerConfig, PrunedModelForCausalLM, PruningCallback
from hf_prune.calibration import training_windows


def main(
    model: Annotated[str, typer.Argument(help="Directory or Hub id of a causal LM.")],
    output: Annotated[Path, typer.Argument(help="New directory for the small model.")],
    train: Annotated[str, typer.Option(help="Text to score units on and to train on.")],
    pruning_ratio: Annotated[float, typer.Option(help="Fraction of decoder parameters to remove in the end.")] = 0.3,
    steps: Annotated[int, typer.Option(help="Optimizer steps; the ratio is reached after half of them.")] = 300,
    seq_len: Annotated[int, typer.Option(help="Tokens of each window.")] = 256,
    num_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 32,
) -> None:
    """Scores are computed anew on the current weights whenever more units are masked."""
    dense = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = dense.num_parameters()
    rows = [{"input_ids": ids, "labels": ids} for ids in training_windows(tokenizer, train, seq_len)]
    config = LLMPrunerConfig(pruning_ratio, num_samples=num_samples, seq_len=seq_len)
    callback = PruningCallback(config, "gradual", calibration=train, every=max(1, steps // 20))
    args = TrainingArguments(
        output_dir=f"{output}-training",
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        dense,
        args,
        train_dataset=rows,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()

    PrunedModelForCausalLM.save_pretrained(trainer.model, output, tokenizer=tokenizer)
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']}: loss {entry['loss']:.3f}, removed {entry['prune/sparsity']:.1%}")
    print(f"parameters {before:,} → {trainer.model.num_parameters():,}")


if __name__ == "__main__":
    typer.run(main)
