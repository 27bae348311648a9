"""`recover()`: train what is left after pruning, keep the best checkpoint, save one ordinary model."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import traceback
from collections.abc import Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import parse_flag_from_env
from safetensors import SafetensorError
from transformers import Trainer, default_data_collator

from hf_prune.atomic import replaced_directory
from hf_prune.calibration import (
    GENERAL,
    Sources,
    calibration_names,
    check_chats,
    is_text,
    sources_of,
    training_windows,
)
from hf_prune.checkpoint.save_hook import plan_of
from hf_prune.checkpoint.saving import check_apart, check_directory, save_pruned
from hf_prune.data import labelled
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.evaluation.generation import samples
from hf_prune.evaluation.perplexity import exp
from hf_prune.format.building import build_empty
from hf_prune.gate import check_windows
from hf_prune.layers.processes import of_main_process, reserved_for_all
from hf_prune.loading import BASE, dense_source, load_config, load_model, load_tokenizer
from hf_prune.recovery.arguments import OTHER, PRESETS, TEXT, distillation_rate, training_arguments, windows_per_step
from hf_prune.recovery.callback import PruningCallback
from hf_prune.recovery.distillation import DistillationTrainer
from hf_prune.recovery.divergence import DivergenceGuard
from hf_prune.recovery.lora import add_adapters, lora_config, merge_adapters
from hf_prune.recovery.processes import distributed_kind
from hf_prune.recovery.resuming import checkpoints, is_whole
from hf_prune.recovery.teacher import TaughtRows, write_predictions
from hf_prune.report.card import Origin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from peft import LoraConfig
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

logger = logging.getLogger(__name__)

Text = Sources | Sequence[Any]
"""Texts, as for `training_windows`, or rows with `input_ids` and `labels`."""

OTHER_WINDOWS = 32
"""Of the text of another kind."""
WORSE = 1.01
"""A perplexity on it that grows by more than this factor is warned of."""


@dataclass(frozen=True)
class RecoveryResult:
    """What `recover` made."""

    model: PreTrainedModel
    """The recovered model, adapters merged: the model that was given, if one was."""
    perplexity_before: float | None
    """On the evaluation text before training; `None` without one."""
    perplexity_after: float | None
    """On the evaluation text with the weights that were saved."""
    other_before: float | None
    """On the text of another kind before training; `None` without one."""
    other_after: float | None
    """On the text of another kind with the weights that were saved."""
    log_history: list[dict[str, float]]
    """The Trainer's log: losses, evaluations (`eval_text_loss`, `eval_other_loss`), `prune/sparsity`,
    `prune/params`."""


def recover(
    model: PreTrainedModel | str | Path,
    output_dir: str | Path,
    *,
    train: Text,
    eval: Text | None = None,
    other: Text | None = GENERAL,
    tokenizer: PreTrainedTokenizerBase | None = None,
    preset: str = "lora",
    lora: LoraConfig | None = None,
    teacher: PreTrainedModel | str | Path | None = None,
    teacher_cache: str | Path | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    hidden_weight: float = 0.0,
    steps: int | None = None,
    tokens: int | None = None,
    seq_len: int = 256,
    assistant_only_loss: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> RecoveryResult:
    """Train a pruned model on text and save it: adapters, norms or all weights, with or without the dense model.

    The Trainer's checkpoints go to `<output_dir>-training`, and are removed when the result is there; that goes to
    `output_dir`, whole or not at all, with plan, tokenizer, model card and report. Started by `accelerate launch`, it
    runs on all processes.

    Args:
        model: a pruned model (or any causal LM): in memory (it is modified in place), or its directory or Hub id.
        output_dir: where the recovered model goes: new or empty, and never where something is read from.
        train: text to train on, or a weighted mixture of several, in windows of `seq_len` tokens; or rows ready for a
            Trainer.
        eval: text to choose the best checkpoint by, in windows of `seq_len` tokens; never text that results are
            reported on.
        other: text of another kind than `train`, never trained on or chosen by: a warning says if the model gets
            worse on it. Default: the bundled mixture, unless that is trained on; `None`: none.
        tokenizer: for a model in memory; default: the one in the model's directory.
        preset: what is trained, and how: `lora` (adapters, merged at the end: LLM-Pruner's recipe), `norms` (norms and
            biases), `full` (all weights), `distill` (all weights, towards the dense model, at a learning rate for
            size and cut: `distillation_rate`).
        lora: other adapters for the preset `lora`.
        teacher: dense model to distil from, see `DistillationTrainer` (also for `temperature`, `alpha` and
            `hidden_weight`); `base`: the one that `model` was pruned from, the default of the preset `distill`.
        teacher_cache: directory for what the teacher predicts on `train`, written before training by
            `write_predictions`: teacher and student then never share a device, and other runs may use it too.
        temperature: of the distributions that are compared, above 0.
        alpha: weight of the teacher against the text, 0 to 1.
        hidden_weight: weight of hidden-state matching, 0 or more.
        steps: optimizer steps, 1 or more; default: 300.
        tokens: of all steps together, in place of `steps`.
        seq_len: tokens of each window, 2 or more.
        assistant_only_loss: of chats in `train` and `eval` only what the assistant says has labels, also for the
            teacher's loss.
        resume: resume from the last whole checkpoint in `<output_dir>-training` (from the start if there is none).
        overwrite: `output_dir` may hold a checkpoint, which is replaced at the end.
        trust_remote_code: whether code that comes with the checkpoints of model and teacher may run.
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
    source = None if isinstance(model, torch.nn.Module) else str(model)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = load_config(source, **trust) if source is not None else model.config  # type: ignore[union-attr]
    other = _other(other, train, tokenizer or source)
    if preset not in PRESETS:
        raise ConfigError(f"preset: found {preset!r}, expected one of {tuple(PRESETS)}.")
    recipe = PRESETS[preset]
    # Small steps are lost in half-precision weights: they are float32 while they are trained.
    dtype = _dtype(config) if recipe.trains != "adapters" else torch.float32
    kind = "bf16" if dtype == torch.bfloat16 else "no"
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):  # refuses arguments that do not say what it was told
        kind = os.environ.get("ACCELERATE_MIXED_PRECISION", kind)
    mixed = {kind: True} if kind in ("bf16", "fp16") and not {"bf16", "fp16"} & options.keys() else {}
    args = training_arguments(
        training_dir,
        {**mixed, **options},
        preset=preset,
        seq_len=seq_len,
        steps=steps,
        tokens=tokens,
        evaluates=eval is not None or other is not None,
        chooses=eval is not None,
    )
    if teacher is None and preset == "distill":
        teacher = BASE
    teacher = dense_source(teacher, config) if isinstance(teacher, str) else teacher
    if isinstance(lora, bool):
        raise ConfigError(f"lora: found {lora}, expected a LoraConfig; preset 'full' trains all weights.")
    if lora is not None and recipe.trains != "adapters":
        raise ConfigError(f"lora: preset {preset!r} trains no adapters; leave it out, or take preset 'lora'.")
    if teacher_cache is not None and (teacher is None or not is_text(train)):
        raise ConfigError("teacher_cache: found no teacher, or rows in place of text; it is for a teacher and a text.")
    written = None if teacher_cache is None else Path(teacher_cache).absolute()
    asked: dict[str, Any] = {"preset": preset, "steps": args.max_steps, "seq_len": seq_len, **options}
    if isinstance(teacher, (str, Path)):
        asked["teacher"] = teacher
    usual: dict[str, Any] = {
        "temperature": (temperature, 1.0),
        "alpha": (alpha, 1.0),
        "hidden_weight": (hidden_weight, 0.0),
    }
    usual |= {"teacher_cache": (teacher_cache, None)}
    asked |= {name: value for name, (value, default) in usual.items() if value != default}
    switches = {"assistant_only_loss": assistant_only_loss, "trust_remote_code": trust_remote_code}
    command = _command(source, output_dir, {"train": train, "eval": eval, "other": other}, asked, switches)
    texts = sources_of(train, "train") | sources_of(eval, "eval") | sources_of(other, "other")
    for target in (directory, training_dir, *([] if written is None else [written])):
        check_apart(target, model=model, teacher=teacher, **texts)
    check_directory(directory, overwrite=overwrite)
    with reserved_for_all(directory), _full_disk(training_dir):
        checkpoint = of_main_process(_checkpoint(training_dir, resume) if args.process_index == 0 else None)
        tokenizer = tokenizer or load_tokenizer(source or config._name_or_path, required=is_text(train), **trust)
        number = args.max_steps * windows_per_step(vars(args))
        shell: Any = model if source is None else build_empty(config)
        rows = partial(_rows, shell, tokenizer, seq_len)
        data = rows(train, number, assistant_only_loss)
        if assistant_only_loss and is_text(train):
            check_chats(row["labels"] for row in data)
        evaluated = {} if eval is None else {TEXT: rows(eval, assistant_only_loss=assistant_only_loss)}
        evaluated |= {} if other is None else {OTHER: rows(other)}
        if OTHER in evaluated:
            evaluated[OTHER] = evaluated[OTHER][:: max(1, len(evaluated[OTHER]) // OTHER_WINDOWS)][:OTHER_WINDOWS]
        own: Any = load_model(source, config=config) if source is not None else model
        check_directory(directory, own, overwrite=overwrite)
        if recipe.learning_rate is None and "learning_rate" not in options:
            args.learning_rate = distillation_rate(own.num_parameters(), _removed(own))
        sharded = distributed_kind(args) in ("FSDP", "DeepSpeed")
        if sharded and source is None:
            raise ConfigError(
                "under FSDP or DeepSpeed pass the model's directory: its weights are gathered through files."
            )

        writes = args.should_save and tokenizer is not None and not sharded
        wrote = {"before recovery": samples(own, tokenizer)} if writes and tokenizer is not None else {}
        if written is not None:
            data = _taught(teacher, own, data, written, temperature, str(args.device), **trust)
            teacher, args.remove_unused_columns = None, False
        own = own.float() if dtype != torch.float32 else own
        use_cache = getattr(own.config, "use_cache", True)  # configs that come with a model need not have it
        trained: Any = own
        frozen: list[torch.nn.Parameter] = []
        if recipe.trains == "adapters":
            trained = add_adapters(own, lora_config(own) if lora is None else lora, seed=args.seed)
        elif recipe.trains == "norms":
            frozen = [parameter for parameter in own.parameters() if parameter.ndim > 1 and parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        distillation: dict[str, Any] = {}
        if teacher is not None or written is not None:
            distillation = {
                "temperature": temperature,
                "alpha": alpha,
                "hidden_weight": hidden_weight,
                "teacher": teacher,
                **trust,
            }
        if args.process_index == 0:
            _announce(trained, teacher, args, seq_len * number, **trust)
        trainer_class = DistillationTrainer if distillation else Trainer
        trainer = trainer_class(
            trained,
            args,
            train_dataset=data,
            eval_dataset=evaluated or None,
            data_collator=default_data_collator,
            processing_class=tokenizer,
            callbacks=_callbacks(own),
            **distillation,
        )
        # Not by `trainer.evaluate()` before training: accelerate then takes the model for prepared and never wraps it
        # in DDP, so that each process trains alone.
        args.eval_on_start = bool(evaluated) and checkpoint is None
        trainer.train(resume_from_checkpoint=checkpoint)
        before = {name: _logged(trainer, name) for name in evaluated}
        losses = trainer.evaluate() if evaluated else {}
        after = {name: exp(losses[f"eval_{name}_loss"]) for name in evaluated}

        result = _gathered(trainer, source, training_dir, config) if sharded else trainer.model
        if recipe.trains == "adapters" and result is not None:
            result = merge_adapters(result)
        for parameter in frozen:
            parameter.requires_grad_(True)
        if result is not None:
            result.config.use_cache = use_cache
            result = result if dtype == torch.float32 else result.to(dtype)
        if args.should_save and result is not None:
            if writes and tokenizer is not None:
                dense = getattr(trainer, "teacher", None)
                wrote = ({} if dense is None else {"dense": samples(dense, tokenizer)}) | wrote
                wrote["after recovery"] = samples(result, tokenizer)
            _note_origin(result, wrote, command)
            _save(result, directory, tokenizer, _report(eval, before.get(TEXT), after.get(TEXT)))
            remove_checkpoints(training_dir)
        trainer.accelerator.wait_for_everyone()
        found = (before.get(TEXT), after.get(TEXT), before.get(OTHER), after.get(OTHER))
        if OTHER in after and not after[OTHER] <= WORSE * before[OTHER]:
            logger.warning(
                "perplexity on text of another kind than was trained on went from %.4g to %.4g: train on a mixture of "
                "texts, for fewer steps, at a lower learning rate, or with the dense model as teacher (preset "
                "'distill')",
                before[OTHER],
                after[OTHER],
            )
        return RecoveryResult(result if result is not None else own, *found, trainer.state.log_history)


def _announce(model: Any, teacher: Any, args: TrainingArguments, tokens: int, **trust: bool) -> None:
    """Log what training costs: products of weights alone, of a mixture of experts those of all of them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learnt, trainable = (sum(own.numel() for own in trained if own.ndim >= dims) for dims in (2, 0))
    operations = 4 * _multiplied(model) + 2 * learnt  # forward, backward to activations, and to what is trained
    if teacher is not None:
        shell = teacher if isinstance(teacher, torch.nn.Module) else build_empty(load_config(str(teacher), **trust))
        operations += 2 * _multiplied(shell)
    saved = trainable if hasattr(model, "peft_config") else model.num_parameters()
    kept = 0 if args.save_strategy == "no" else 4 * (saved + 2 * trainable)  # and AdamW's two moments
    logger.info(
        "this run trains on %s tokens in %s steps, computes at most %.3g TFLOP, and writes checkpoints of %.3g GB",
        f"{tokens:,}",
        f"{args.max_steps:,}",
        operations * tokens / 1e12,
        kept / 1e9,
    )


def _multiplied(model: Any) -> int:
    """Parameters of matrices that a token is multiplied by."""
    found = {id(parameter): parameter.numel() for parameter in model.parameters() if parameter.ndim > 1}
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    if head is None or head.weight is not embedding:
        found.pop(id(embedding), None)
    return sum(found.values())


def _command(
    source: str | None,
    output_dir: str | Path,
    texts: dict[str, Text | None],
    asked: dict[str, Any],
    switches: dict[str, bool],
) -> list[str]:
    """Words of the command that does the same; rows have no name."""
    words = ["recover", source or "MODEL", str(output_dir)]
    for name, text in texts.items():
        words += [word for part in calibration_names(text) for word in (f"--{name}", part)]
    words += ["--other", "none"] if texts["other"] is None else []
    words += [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return words + [f"--{name.replace('_', '-')}" for name, given in switches.items() if given]


def _checkpoint(training_dir: Path, resume: bool) -> str | None:
    """The checkpoint to resume from."""
    found = checkpoints(training_dir)
    if found and not resume:
        raise CheckpointError(
            f"{training_dir} holds checkpoints of an earlier run. Go on with it (resume=True, --resume), or remove it."
        )
    while found and not is_whole(found[0]):
        logger.warning("%s was not written to its end, and is removed", found[0])
        shutil.rmtree(found.pop(0))
    if resume and not found:
        logger.warning("no checkpoint in %s: training starts from the beginning", training_dir)
    return str(found[0]) if found else None


@contextmanager
def _full_disk(training_dir: Path) -> Iterator[None]:
    """Name what to do when the Trainer cannot write a checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        in_torch = any(frame.f_code is torch.save.__code__ for frame in frames)  # whose errors say nothing of the disk
        if not (full or in_torch or isinstance(error, SafetensorError)):
            raise
        raise CheckpointError(
            f"training stopped: writing to {training_dir} failed ({str(error).splitlines()[0]}). Free disk space and "
            "go on with resume=True (--resume)."
        ) from error


def _rows(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    seq_len: int,
    text: Text,
    number: int | None = None,
    assistant_only_loss: bool = False,
) -> Any:
    """Rows for a Trainer: windows of texts, of a mixture so many, or what the caller brought."""
    if not is_text(text):
        if not isinstance(text, Sized) or len(text) == 0:
            raise ConfigError(f"rows for training: found {type(text).__name__} without a length or any row.")
        return text
    if tokenizer is None:
        raise ConfigError("text for training needs a tokenizer; pass the model's own.")
    how: dict[str, Any] = {"number": number, "assistant_only_loss": assistant_only_loss}
    rows = [labelled(window) for window in training_windows(tokenizer, text, seq_len, **how)]  # type: ignore[arg-type]
    check_windows(model, [{"input_ids": row["input_ids"][None]} for row in rows])
    return rows


def _taught(
    teacher: Any,
    student: Any,
    rows: list[dict[str, Tensor]],
    directory: Path,
    temperature: float,
    device: str,
    trust_remote_code: bool,
) -> Any:
    """The same rows with what the teacher predicts; windows that come several times are predicted once."""
    windows, order = torch.unique(torch.stack([row["input_ids"] for row in rows]), dim=0, return_inverse=True)
    write_predictions(
        teacher,
        windows,
        directory,
        temperature=temperature,
        student=student,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    return TaughtRows(rows, order.tolist(), directory)


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    """Of the weights of a checkpoint."""
    found = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found


def _other(other: Text | None, train: Text, tokenizer: object) -> Text | None:
    """The text of another kind, if there is one: not what is trained on, and not without a tokenizer."""
    if other is not None and is_text(other) and (tokenizer is None or set(_sources(other)) & set(_sources(train))):
        return None
    return other


def _sources(text: Text | None) -> list[Any]:
    return list(sources_of(text, "training text").values())


def _removed(model: PreTrainedModel) -> float:
    """Share of the decoder's parameters that were pruned, as far as the checkpoint tells."""
    plan = plan_of(model)
    return 0.0 if plan is None else plan.achieved["decoder"]


def _logged(trainer: Trainer, name: str) -> float:
    """Perplexity before training: all windows have the same number of tokens, so it is `exp` of the loss."""
    losses = [entry[f"eval_{name}_loss"] for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
    return exp(losses[0])


def _callbacks(model: Any) -> list[Any]:
    pruned = getattr(model.config, "pruning_config", None)
    return [DivergenceGuard(), *([PruningCallback(mode="report")] if pruned else [])]


def _gathered(trainer: Trainer, source: str | None, training_dir: Path, config: PreTrainedConfig) -> Any:
    """The whole model on the first process, `None` on the others: shards are written out and read again."""
    final = training_dir / "final"
    trainer.save_model(str(final))
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.should_save:
        return None
    assert source is not None
    if (final / "adapter_config.json").exists():
        from peft import PeftModel

        return PeftModel.from_pretrained(load_model(source, config=config), final)
    return load_model(str(final), config=config)


def remove_checkpoints(training_dir: Path) -> None:
    """Remove what a finished run needs no longer: weights and optimizer states, several times the model."""
    for path in [*checkpoints(training_dir), training_dir / "final"]:
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # logs are in it
        training_dir.rmdir()


def _note_origin(model: Any, wrote: dict[str, dict[str, str]], words: list[str]) -> None:
    """What the report says of a model that was pruned; `wrote` has texts by model and prompt."""
    if (plan := plan_of(model)) is not None:
        prompts = [prompt for prompt in next(iter(wrote.values()), {}) if all(prompt in own for own in wrote.values())]
        found = {prompt: {name: own[prompt] for name, own in wrote.items()} for prompt in prompts}
        model._origin = Origin(plan, {}, samples=found, then=words)


def _save(model: Any, directory: Path, tokenizer: PreTrainedTokenizerBase | None, report: dict[str, Any]) -> None:
    if getattr(model.config, "pruning_config", None):
        save_pruned(model, directory, tokenizer=tokenizer, report=report)
        return
    with replaced_directory(Path(os.path.realpath(directory))) as new:
        model.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)


def _report(text: Text | None, before: float | None, after: float | None) -> dict[str, Any]:
    if before is None or after is None:
        return {}
    name = " ".join(["perplexity", *(f"on {Path(str(source)).name}" for source in _sources(text))])
    return {name: {"before recovery": before, "after recovery": after}}
