"""Resume: from the newest checkpoint that is whole, also of a model that was pruned on the way."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from hf_prune.checkpoint.files import agrees, load_plan, read_json
from hf_prune.errors import CheckpointError
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.in_place import apply_plan_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def last_checkpoint(directory: str | Path) -> str | None:
    """The newest whole checkpoint in the `output_dir` of a `Trainer`, `None` if there is none.

    A kill or a full disk while it is written leaves a `checkpoint-N` that no `Trainer` can resume from, and that
    `resume_from_checkpoint=True` takes all the same. Pass what this returns in place of `True`.
    """
    return next((str(path) for path in checkpoints(directory) if is_whole(path)), None)


def checkpoints(directory: str | Path) -> list[Path]:
    """Checkpoints of a `Trainer`, whole or not, the newest first."""
    found = [path for path in Path(directory).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether all files of a `Trainer`'s checkpoint can be read to their end; trainer_state.json is written last."""
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
        for path in checkpoint.rglob("*.safetensors"):
            safe_open(path, "pt")  # compares the length
    except (CheckpointError, OSError, SafetensorError):
        return False
    archives = [path for ending in ("*.pt", "*.pth", "*.bin") for path in checkpoint.rglob(ending)]
    return all(zipfile.is_zipfile(path) for path in archives)


def align_to_checkpoint(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Slice the dense `model` in place to the shapes of `checkpoint`, so that a `Trainer` can resume from there.

    Weights are not read; `Trainer.train(resume_from_checkpoint=...)` does that. A model that has these widths already
    is left as it is. Loading the checkpoint with `from_pretrained` works too.

    Args:
        model: the dense model that the checkpoint was pruned from.
        checkpoint: directory of a pruned checkpoint.

    Raises:
        CheckpointError: the checkpoint is not whole, or there is no plan in it.
        PlanError: the plan is for another model.
    """
    if Path(checkpoint) in checkpoints(Path(checkpoint).parent) and not is_whole(Path(checkpoint)):
        raise CheckpointError(
            f"{checkpoint} is not whole; the newest that is: {last_checkpoint(Path(checkpoint).parent) or 'none'}."
        )
    plan = load_plan(checkpoint)
    if plan is None:
        raise CheckpointError(f"{checkpoint} holds no pruning plan: it was not pruned. Resume with the model as it is.")
    if getattr(model.config, "pruning_config", None) is None or not agrees(plan, model.config):
        apply_plan_(model, infer_structure(model), plan)
