"""Options of transformers' `TrainingArguments`: read from a command line, completed, checked."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from hf_prune.errors import ConfigError, check_whole_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import TrainingArguments


@dataclass(frozen=True)
class Preset:
    """How to train what is left."""

    trains: Literal["adapters", "norms", "all"]
    """Which weights; `norms`: those of one dimension, norms and biases (PERP, arXiv 2312.15230)."""
    learning_rate: float | None
    """Of AdamW; `None`: `distillation_rate`."""
    batch_size: int
    """Windows of one optimizer step, over all processes."""


PRESETS = {
    "lora": Preset("adapters", 1e-4, 64),  # LLM-Pruner's recovery stage
    "norms": Preset("norms", 1e-3, 16),
    "full": Preset("all", 5e-5, 64),
    "distill": Preset("all", None, 16),
}
"""By name. `distill` takes the dense model as teacher; the others train on the text unless given one."""
TEXT, OTHER = "text", "other"
"""What evaluations are called in the Trainer's log: `eval_text_loss`, `eval_other_loss`."""
EVAL_LOSS = f"eval_{TEXT}_loss"
_OURS = {"output_dir": "the output directory", "max_steps": "steps or tokens", "resume_from_checkpoint": "resume"}


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
    directory: Path,
    options: Mapping[str, Any],
    *,
    preset: str,
    seq_len: int,
    steps: int | None = None,
    tokens: int | None = None,
    evaluates: bool,
    chooses: bool,
) -> TrainingArguments:
    """`TrainingArguments` from `options` and the defaults of a preset.

    AdamW, linear decay, warm-up over 100 steps or a tenth of all. Ten evaluations and checkpoints; where it `chooses`
    (`metric_for_best_model`: the loss on the evaluation text) the best checkpoint is the result.

    Raises:
        ConfigError: an option that does not exist, that has another name here, or a value that is refused.
    """
    from transformers import TrainingArguments

    for name, ours in _OURS.items():
        if name in options:
            raise ConfigError(f"{name}: say this by {ours}.")
    check_whole_numbers(seq_len=(seq_len, 2))
    sizes: dict[str, Any] = {}
    if "per_device_train_batch_size" not in options and "gradient_accumulation_steps" not in options:
        per_step = 8 * _num_processes()
        accumulated = max(1, PRESETS[preset].batch_size // per_step)
        sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": accumulated}
    windows = windows_per_step({**sizes, **options})
    if tokens is not None:
        if steps is not None:
            raise ConfigError("steps and tokens both say how long to train: leave out one.")
        check_whole_numbers(tokens=(tokens, 1))
        steps = -(-tokens // (windows * seq_len))
    steps = 300 if steps is None else steps
    check_whole_numbers(steps=(steps, 1))
    tenth = max(1, steps // 10)
    defaults: dict[str, Any] = {
        "learning_rate": PRESETS[preset].learning_rate or 5e-5,
        "warmup_steps": min(100, tenth),
        "logging_steps": min(10, tenth),
        "save_steps": tenth,
        "save_total_limit": 2,
        "report_to": "none",
        "seed": 0,
        "prediction_loss_only": True,
        "dataloader_pin_memory": torch.cuda.is_available() and not options.get("use_cpu"),  # else torch warns
    }
    if evaluates:
        defaults |= {"eval_strategy": "steps", "eval_steps": options.get("save_steps", tenth)}
    if chooses:
        defaults |= {"load_best_model_at_end": True, "metric_for_best_model": EVAL_LOSS, "greater_is_better": False}
    try:
        return TrainingArguments(output_dir=str(directory), max_steps=steps, **{**defaults, **sizes, **options})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"TrainingArguments refuses these options: {error}") from error


def windows_per_step(options: Mapping[str, Any]) -> int:
    """Windows of one optimizer step, over all processes."""
    sizes = [options.get(name, 1) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")]
    check_whole_numbers(per_device_train_batch_size=(sizes[0], 1), gradient_accumulation_steps=(sizes[1], 1))
    return int(sizes[0]) * int(sizes[1]) * _num_processes()


def distillation_rate(num_parameters: int, removed: float) -> float:
    """Learning rate of AdamW for all weights of a pruned model, distilled: 3e-4·(10⁸/P)^¼·√(removed/0.5).

    Half of the decoder removed from 8 B parameters gives the 1e-4 of Minitron (arXiv 2407.14679, 2408.11796), whose
    rule is a smaller one for larger models and lighter cuts.

    Args:
        num_parameters: of the pruned model.
        removed: share of the decoder's parameters, 0 to 1; below 0.05 it counts as 0.05.
    """
    return float(3e-4 * (1e8 / num_parameters) ** 0.25 * (max(removed, 0.05) / 0.5) ** 0.5)


def read_tokens(text: str) -> int:
    """A number of tokens as written on a command line: `500000`, `500k`, `2M`, `1.5B`.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", text.strip().lower())
    found = 0 if match is None else round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2]])
    if found < 1:
        raise ConfigError(f"tokens: found {text!r}, expected a number such as 500000, 500k, 2M or 1.5B.")
    return found


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _json(value: Any) -> Any:
    """Dictionaries are given as JSON text."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{value!r} is not JSON: {error}.") from error
    return value
