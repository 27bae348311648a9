"""Write pruned checkpoints as a whole, or not at all."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from hf_prune.atomic import check_free, replaced_directory
from hf_prune.checkpoint.files import (
    CARD_NAME,
    CODE_NAME,
    CURVE_NAME,
    PICTURE_NAME,
    PLAN_NAME,
    REPORT_NAME,
    SCORES_NAME,
    agrees,
    load_plan,
    read_plan,
)
from hf_prune.checkpoint.save_hook import check_source, install_save_hook, plan_of, source_plans
from hf_prune.checkpoint.verifying import verify_checkpoint
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.layers.processes import main_writes
from hf_prune.layers.weights import is_on_disk, to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.plan import PruningPlan
    from hf_prune.report.card import Origin

__all__ = ["install_save_hook", "load_plan", "save_pruned", "verify_checkpoint", "write_card"]

logger = logging.getLogger(__name__)

DISK_SHARD = 1_000_000_000
"""Bytes of a weights file of a model whose layers are on disk, at most."""

# What may lie in a directory that is replaced. Files of the model are written anew; the others are taken over.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    PLAN_NAME,
    CODE_NAME,
    PICTURE_NAME,
    CURVE_NAME,
    REPORT_NAME,
    SCORES_NAME,
)
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "chat_template*",
    "additional_chat_templates",
    "normalizer.json",
    "tekken.json",
)
_OTHER_FILES = (CARD_NAME, "LICENSE*", "NOTICE*", ".gitattributes", "*processor_config.json")


def save_pruned(
    model: PreTrainedModel,
    save_directory: str | Path,
    *,
    plan: PruningPlan | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "50GB",
    report: Mapping[str, Any] | None = None,
) -> None:
    """Save a pruned model with plan, tokenizer, model card and pictures. Replaces `save_directory` in one step.

    As `save_pretrained` does, it replaces an older checkpoint: training saves again and again. But never one that the
    model was pruned from: nothing could bring that back. Of several processes that torch.distributed connects the
    main one writes, and the others that call it wait.

    Everything is written beside `save_directory` and swapped in by renames: an error, a full disk or an interruption
    leaves what was there. Weights are safetensors only. From an older checkpoint in `save_directory`, tokenizer files
    (if `tokenizer` is `None`), licence files and the hand-written parts of README.md are taken over. The pictures are
    `widths.png`, where the model was just pruned `scores.png`, and where the masks were learned `learning_curve.png`.

    Args:
        model: pruned model, its config carrying `pruning_config`.
        save_directory: where to; must be new, empty, or hold nothing but a checkpoint.
        plan: plan the model was pruned with; default: the one it carries or was loaded with.
        tokenizer: saved beside the model if given.
        max_shard_size: largest weights file, in bytes or as in `"5GB"`; of a model on disk 1 GB at most, since a whole
            file is in memory while it is written.
        report: measurements for the model card, `{what: value}` or `{what: {column: value}}`.

    Raises:
        CheckpointError: the model or the directory cannot be saved (nothing is written), or writing failed (nothing is
            changed); the message names what failed.
    """
    directory = Path(os.path.realpath(save_directory))
    _check_model(model, plan)
    if tokenizer is not None:
        _check_tokenizer(model, tokenizer)
    install_save_hook()
    check_source(model, directory)
    plan = plan or plan_of(model, directory)
    if plan is not None:
        model._pruning_plan = plan  # from here on it travels with the model
    with main_writes(f"save {directory}") as mine:
        if mine:
            check_directory(directory, model)
            _write(model, directory, tokenizer, max_shard_size, report)


def _write(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    max_shard_size: int | str,
    report: Mapping[str, Any] | None,
) -> None:
    with replaced_directory(directory) as new:
        with _naming("the weights and configuration", directory):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
                shard_size = min(to_bytes(max_shard_size), DISK_SHARD) if is_on_disk(model) else max_shard_size
                model.save_pretrained(new, max_shard_size=shard_size)
            for path in new.glob("*.safetensors"):  # safetensors 0.8 makes them private to the user
                path.chmod((new / "config.json").stat().st_mode)
        if tokenizer is not None:
            with _naming("the tokenizer", directory):
                tokenizer.save_pretrained(new)
        with _naming("files of the older checkpoint", directory):
            _take_over(directory, new, with_tokenizer=tokenizer is None)
        with _naming("the model card", directory):
            write_card(model, new, model_id=directory.name, report=report)


def write_card(
    model: PreTrainedModel,
    directory: Path,
    *,
    model_id: str,
    report: Mapping[str, Any] | None = None,
    existing: str | None = None,
    base_card: str | None = None,
) -> None:
    """Write README.md, the pictures and report.html of a pruned model into `directory`; arguments as for `model_card`.

    `existing` is the card to merge into, by default the README.md in `directory`.
    """
    from hf_prune.report.card import model_card
    from hf_prune.report.html import html_page

    plan, path, origin = plan_of(model), directory / CARD_NAME, getattr(model, "_origin", None)
    origin = origin if origin is not None and origin.plan == plan else None
    picture = plan is not None and _draw_widths(plan, directory / PICTURE_NAME)
    drawn = {name: _draw_origin(model, plan, origin, directory / name) for name in (SCORES_NAME, CURVE_NAME)}
    if existing is None and path.exists():
        existing = path.read_text(encoding="utf-8")
    card = model_card(
        model.config,
        num_parameters=model.num_parameters(),
        plan=plan,
        model_id=model_id,
        report=report,
        base_card=base_card,
        existing=existing,
        origin=origin,
        picture=PICTURE_NAME if picture else None,
        scores=SCORES_NAME if drawn[SCORES_NAME] else None,
        curve=CURVE_NAME if drawn[CURVE_NAME] else None,
    )
    path.write_text(str(card), encoding="utf-8")
    (directory / REPORT_NAME).write_text(html_page(str(card), model_id, directory), encoding="utf-8")


def _check_model(model: PreTrainedModel, plan: PruningPlan | None) -> None:
    if not getattr(model.config, "pruning_config", None):
        raise CheckpointError(
            f"this {type(model).__name__} has no `pruning_config`, so it was not pruned by hf_prune. "
            "Save it with model.save_pretrained()."
        )
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            "the model carries an adapter. Merge it (model = model.merge_and_unload()) and save again, or save the "
            "adapter alone with model.save_pretrained()."
        )
    if plan is not None and not agrees(plan, model.config):
        recorded = model.config.pruning_config.get("widths", {})
        found = {axis: n for axis, n in plan.widths.items() if axis in plan.kept_indices or axis in recorded}
        wrong = next(axis for axis, n in {**recorded, **found}.items() if found.get(axis) != recorded.get(axis))
        raise CheckpointError(
            f"the plan gives {wrong} the width {found.get(wrong)}, the model's config {recorded.get(wrong)}. "
            "Pass the plan this model was pruned with, or none."
        )


def _check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse the dense model's tokenizer beside a smaller vocabulary: it would give other ids."""
    tokens = model.config.pruning_config.get("widths", {}).get("vocab")
    if tokens is not None and len(tokenizer) != tokens:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {tokens}: its vocabulary was pruned. Pass "
            "the tokenizer that goes with it (`PruningResult.tokenizer`, or that of `prune_tokenizer`)."
        )


def check_apart(directory: Path, **inputs: Any) -> None:
    """Refuse a directory to write to that is, or holds, what is read: a model, a text, a work directory, ...

    Args:
        directory: will be replaced as a whole.
        **inputs: by name; Hub ids, rows, and models that come from no directory are passed over.

    Raises:
        CheckpointError: it is an input, by whichever links and paths, or one lies in it.
    """
    for name, value in inputs.items():
        source = getattr(getattr(value, "config", None), "_name_or_path", value)
        if not source or not (isinstance(source, Path) or (isinstance(source, str) and os.path.exists(source))):
            continue
        path = Path(os.path.realpath(source))
        if any(_are_same(directory, place) for place in (path, *path.parents)):
            raise CheckpointError(
                f"the output {directory} would replace what is read: {name} is {source}. Choose another output."
            )


def _are_same(one: Path, other: Path) -> bool:
    with suppress(OSError):  # one is not there
        return os.path.samefile(one, other)
    return os.path.realpath(one) == os.path.realpath(other)


def check_directory(
    directory: Path, model: PreTrainedModel | None = None, *, overwrite: bool = True, known: Sequence[str] = ()
) -> None:
    """Refuse what must not be replaced, and a disk too full for `model` if it is known, before anything is done.

    `known` are names of files that it may hold besides those of a checkpoint.

    Raises:
        CheckpointError: `directory` is a file, holds more than a checkpoint, or (without `overwrite`) anything, or the
            model does not fit on the disk.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file, expected a directory. Choose another save directory.")
    known = [*known, *_MODEL_FILES, *_TOKENIZER_FILES, *_OTHER_FILES]
    if directory.is_dir():
        if (directory / "config.json").exists():
            known.append("*.py")  # models with code of their own
        foreign = sorted(e.name for e in directory.iterdir() if not any(fnmatch(e.name, k) for k in known))
        if foreign:
            some = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            raise CheckpointError(
                f"{directory} holds more than a checkpoint ({some}) and would be replaced as a whole. "
                "Choose a new directory, or move these files away."
            )
        if not overwrite and any(directory.iterdir()):
            raise CheckpointError(
                f"{directory} holds a checkpoint already. Choose a new directory, or replace it (overwrite=True, "
                "--overwrite)."
            )
    if model is not None:
        check_free(directory, sum(p.numel() * p.element_size() for p in model.parameters()))


@contextmanager
def _naming(what: str, directory: Path) -> Iterator[None]:
    """Turn failures of the disk into an error that names `what` was being written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not save to {directory}: writing {what} failed ({error}). What was there before is unchanged. "
            "Check free space and permissions, or choose another directory."
        ) from error


def _take_over(old: Path, new: Path, *, with_tokenizer: bool) -> None:
    """Copy what a new save does not write: licence, card, and the tokenizer if none was given."""
    if not old.is_dir():
        return
    patterns = (*_OTHER_FILES, *(_TOKENIZER_FILES if with_tokenizer else ()))
    for entry in old.iterdir():
        target = new / entry.name
        if target.exists() or not any(fnmatch(entry.name, pattern) for pattern in patterns):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target)
        else:
            shutil.copy2(entry, target)


def _draw_widths(plan: PruningPlan, path: Path) -> bool:
    """Draw the widths picture; without matplotlib (an optional extra) there is none."""
    if not _can_draw(path):
        return False
    from hf_prune.report.pictures import widths_picture

    widths_picture(plan.widths, plan.num_units, path)
    return True


def _draw_origin(model: PreTrainedModel, plan: PruningPlan | None, origin: Origin | None, path: Path) -> bool:
    """Draw scores or the learning curve, or copy the picture from where the model was loaded; whether there is one.

    Pictures count only together with the plan they led to.
    """
    if plan is None:
        return False
    if origin is not None and (origin.scores or origin.history):
        if not _can_draw(path):
            return False
        from hf_prune.report import pictures

        with suppress(ConfigError):  # nothing to draw: a step or two, no axis of a layer
            if path.name == CURVE_NAME:
                pictures.learning_curve_picture(origin.history, path)
            else:
                pictures.scores_picture(origin.scores, plan.widths, path)
        return path.exists()
    for source in source_plans(model.config):
        picture = source.with_name(path.name)
        with suppress(CheckpointError):  # ignore damaged plans
            if source.is_file() and picture.is_file() and read_plan(source) == plan:
                shutil.copyfile(picture, path)
                return True
    return False


def _can_draw(path: Path) -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.info("no %s: matplotlib is not installed (pip install 'hf_prune[plot]')", path.name)
        return False
    return True
