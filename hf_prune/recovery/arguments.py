"""Options of transformers' `TrainingArguments`: read from a command line, completed, checked."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from hf_prune.errors import ConfigError, check_whole_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import TrainingArguments

BATCH = 64
"""Sequences of one optimizer step, over all processes: LLM-Pruner's."""
_OURS = {"output_dir": "the output directory", "max_steps": "steps", "resume_from_checkpoint": "resume"}


def parse_training_options(words: Sequence[str]) -> dict[str, Any]:
    """Options of `TrainingArguments` as given on a command line, `--learning-rate 1e-4 --bf16`; only those given.

    Raises:
        ConfigError: an option that `TrainingArguments` does not have, or a value that it does not take.
    """
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            raise ConfigError(f"{message}. Options of training are the fields of transformers' TrainingArguments.")

    parser = Parser(TrainingArguments, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    found, unknown = parser.parse_known_args(list(words))
    if unknown:
        raise ConfigError(
            f"unknown: {' '.join(unknown)}. Expected options of `recover` or fields of transformers' "
            "TrainingArguments, such as --learning-rate 1e-4; the two directories come first."
        )
    return {name: _json(value) for name, value in vars(found).items()}


def training_arguments(
    directory: Path, options: Mapping[str, Any], *, steps: int, lora: bool, evaluates: bool
) -> TrainingArguments:
    """`TrainingArguments` from `options` and our defaults: the recipe of LLM-Pruner's recovery stage.

    AdamW, learning rate 1e-4 with LoRA and 5e-5 without, warm-up over 100 steps or a tenth of all, 64 sequences per
    step. Ten evaluations and checkpoints; with evaluation text the best checkpoint is the result.

    Raises:
        ConfigError: an option that does not exist, that has another name here, or a value that is refused.
    """
    from transformers import TrainingArguments

    for name, ours in _OURS.items():
        if name in options:
            raise ConfigError(f"{name}: say this by {ours}.")
    check_whole_numbers(steps=(steps, 1))
    tenth = max(1, steps // 10)
    defaults: dict[str, Any] = {
        "learning_rate": 1e-4 if lora else 5e-5,
        "warmup_steps": min(100, tenth),
        "logging_steps": min(10, tenth),
        "save_steps": tenth,
        "save_total_limit": 2,
        "report_to": "none",
        "seed": 0,
        "prediction_loss_only": True,
    }
    if evaluates:
        defaults |= {"eval_strategy": "steps", "eval_steps": options.get("save_steps", tenth)}
        defaults |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    if "per_device_train_batch_size" not in options and "gradient_accumulation_steps" not in options:
        per_step = 8 * int(os.environ.get("WORLD_SIZE", "1"))
        defaults |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": max(1, BATCH // per_step)}
    try:
        return TrainingArguments(output_dir=str(directory), max_steps=steps, **{**defaults, **options})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"TrainingArguments refuses these options: {error}") from error


def _json(value: Any) -> Any:
    """Dictionaries are given as JSON text."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{value!r} is not JSON: {error}.") from error
    return value
