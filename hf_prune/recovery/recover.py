"""`recover()`: train what is left after pruning, keep the best checkpoint, save one ordinary model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from hf_prune.checkpoint.saving import check_directory, save_pruned
from hf_prune.data import training_windows
from hf_prune.errors import CheckpointError, ConfigError, check_whole_numbers
from hf_prune.loading import load_model, load_tokenizer
from hf_prune.recovery.arguments import training_arguments
from hf_prune.recovery.callback import PruningCallback
from hf_prune.recovery.distillation import DistillationTrainer
from hf_prune.recovery.divergence import DivergenceGuard
from hf_prune.recovery.lora import add_adapters, lora_config, merge_adapters
from hf_prune.recovery.processes import launcher

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Text = str | Path | Sequence[Any]
"""A file or a dataset of the Hub, or rows with `input_ids` and `labels`."""


@dataclass(frozen=True)
class RecoveryResult:
    """What `recover` made."""

    model: PreTrainedModel
    """The recovered model, adapters merged: the model that was given, if one was."""
    perplexity_before: float | None
    """On the evaluation text before training; `None` without one."""
    perplexity_after: float | None
    """On the evaluation text with the weights that were saved."""
    log_history: list[dict[str, float]]
    """The Trainer's log: losses, evaluations, `prune/sparsity`, `prune/params`."""


def recover(
    model: PreTrainedModel | str | Path,
    output_dir: str | Path,
    *,
    train: Text,
    eval: Text | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    lora: bool | LoraConfig = True,
    teacher: PreTrainedModel | str | Path | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    hidden_weight: float = 0.0,
    steps: int = 300,
    seq_len: int = 256,
    resume: bool = False,
    **options: Any,
) -> RecoveryResult:
    """Train a pruned model on text and save it: LoRA or all weights, with or without the dense model as teacher.

    The Trainer's checkpoints go to `<output_dir>-training`, which stays; the result goes to `output_dir`, whole or not
    at all, with plan, tokenizer and model card. Started by `accelerate launch`, it runs on all processes.

    Args:
        model: a pruned model (or any causal LM): in memory (it is modified in place), or its directory or Hub id.
        output_dir: where the recovered model goes: new, empty, or a checkpoint that it replaces.
        train: text to train on, cut into windows of `seq_len` tokens; or rows ready for a Trainer.
        eval: text to choose the best checkpoint by, in windows of `seq_len` tokens; never text that results are
            reported on.
        tokenizer: for a model in memory; default: the one in the model's directory.
        lora: train adapters, and merge them at the end: by LLM-Pruner's recipe, or a `peft.LoraConfig`. `False`: all
            weights.
        teacher: dense model to distil from, see `DistillationTrainer` (also for the next three).
        temperature: of the distributions that are compared, above 0.
        alpha: weight of the teacher against the text, 0 to 1.
        hidden_weight: weight of hidden-state matching, 0 or more.
        steps: optimizer steps, 1 or more.
        seq_len: tokens of each window, 2 or more.
        resume: go on from the last checkpoint in `<output_dir>-training` (from the start if there is none).
        **options: fields of `TrainingArguments`, in place of the defaults of `training_arguments`.

    Returns:
        The recovered model and its perplexities.

    Raises:
        ConfigError: an option is unknown or out of range.
        CalibrationError: a text is missing or too short.
        CheckpointError: the model cannot be loaded, `output_dir` not be written, or an earlier run is in the way.
        DivergenceError: training gave numbers that are not finite; the last good checkpoint is named.
    """
    directory = Path(output_dir).absolute()
    training_dir = directory.with_name(f"{directory.name}-training")
    args = training_arguments(training_dir, options, steps=steps, lora=bool(lora), evaluates=eval is not None)
    source = None if _in_memory(model) else str(model)
    own = load_model(source) if source is not None else model
    name = source or own.config._name_or_path  # type: ignore[union-attr]
    tokenizer = tokenizer or load_tokenizer(name, required=isinstance(train, (str, Path)))
    check_directory(directory, own)
    checkpoint = _checkpoint(training_dir, resume)
    rows = {"train_dataset": _rows(train, tokenizer, seq_len)}
    if eval is not None:
        rows["eval_dataset"] = _rows(eval, tokenizer, seq_len)
    sharded = launcher(args) in ("FSDP", "DeepSpeed")
    if sharded and source is None:
        raise ConfigError("under FSDP or DeepSpeed pass the model's directory: its weights are gathered through files.")

    use_cache = own.config.use_cache  # type: ignore[union-attr]
    trained: Any = own
    if lora:
        trained = add_adapters(own, lora_config(own) if lora is True else lora, seed=args.seed)  # type: ignore[arg-type]
    distillation: dict[str, Any] = {}
    if teacher is not None:
        distillation = {"temperature": temperature, "alpha": alpha, "hidden_weight": hidden_weight, "teacher": teacher}
    trainer_class = Trainer if teacher is None else DistillationTrainer
    trainer = trainer_class(
        trained,
        args,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        callbacks=_callbacks(own),
        **rows,
        **distillation,
    )
    # Not by `trainer.evaluate()` before training: accelerate then takes the model for prepared and never wraps it in
    # DDP, so that each process trains alone.
    args.eval_on_start = eval is not None and checkpoint is None
    trainer.train(resume_from_checkpoint=checkpoint)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    before = _perplexity(losses[0]) if losses else None
    after = _perplexity(trainer.evaluate()["eval_loss"]) if eval is not None else None

    result = _gathered(trainer, source, training_dir) if sharded else trainer.model
    if lora and result is not None:
        result = merge_adapters(result)
    if result is not None:
        result.config.use_cache = use_cache
    if args.should_save and result is not None:
        _save(result, directory, tokenizer, _report(eval, before, after))
    trainer.accelerator.wait_for_everyone()
    return RecoveryResult(result if result is not None else own, before, after, trainer.state.log_history)  # type: ignore[arg-type]


def _in_memory(model: object) -> bool:
    return isinstance(model, torch.nn.Module)


def _checkpoint(training_dir: Path, resume: bool) -> str | None:
    """The checkpoint to go on from."""
    found: str | None = get_last_checkpoint(str(training_dir)) if training_dir.is_dir() else None
    if found is not None and not resume:
        raise CheckpointError(
            f"{training_dir} holds checkpoints of an earlier run. Go on with it (resume=True, --resume), or remove it."
        )
    if resume and found is None:
        logger.warning("no checkpoint in %s: training starts from the beginning", training_dir)
    return found


def _rows(text: Text, tokenizer: PreTrainedTokenizerBase | None, seq_len: int) -> Any:
    """Rows for a Trainer: windows of a text, or what the caller brought."""
    if not isinstance(text, (str, Path)):
        if not isinstance(text, Sized) or len(text) == 0:
            raise ConfigError(f"rows for training: found {type(text).__name__} without a length or any row.")
        return text
    check_whole_numbers(seq_len=(seq_len, 2))
    if tokenizer is None:
        raise ConfigError("text for training needs a tokenizer; pass the model's own.")
    return [{"input_ids": ids, "labels": ids} for ids in training_windows(tokenizer, text, seq_len)]


def _callbacks(model: Any) -> list[Any]:
    pruned = getattr(model.config, "pruning_config", None)
    return [DivergenceGuard(), *([PruningCallback(mode="report")] if pruned else [])]


def _perplexity(loss: float) -> float:
    """`exp` of the evaluation loss: all windows have the same number of tokens, so it is that of `perplexity`."""
    return math.exp(loss) if loss < 700 else math.inf


def _gathered(trainer: Trainer, source: str | None, training_dir: Path) -> Any:
    """The whole model on the first process, `None` on the others: shards are written out and read again."""
    final = training_dir / "final"
    trainer.save_model(str(final))
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return None
    assert source is not None
    if (final / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(load_model(source), final)
    return load_model(str(final))


def _save(model: Any, directory: Path, tokenizer: PreTrainedTokenizerBase | None, report: dict[str, Any]) -> None:
    if getattr(model.config, "pruning_config", None):
        save_pruned(model, directory, tokenizer=tokenizer, report=report)
        return
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _report(text: Text | None, before: float | None, after: float | None) -> dict[str, Any]:
    if before is None or after is None:
        return {}
    name = f"perplexity on {Path(text).name}" if isinstance(text, (str, Path)) else "perplexity"
    return {name: {"before recovery": before, "after recovery": after}}
