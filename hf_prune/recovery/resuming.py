"""Resume from a checkpoint of a model that was pruned on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_prune.checkpoint.files import agrees, load_plan
from hf_prune.errors import CheckpointError
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.in_place import apply_plan_

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel


def align_to_checkpoint(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Slice the dense `model` in place to the shapes of `checkpoint`, so that a `Trainer` can resume from there.

    Weights are not read; `Trainer.train(resume_from_checkpoint=...)` does that. A model that has these widths already
    is left as it is. Loading the checkpoint with `from_pretrained` does as well.

    Args:
        model: the dense model that the checkpoint was pruned from.
        checkpoint: directory of a pruned checkpoint.

    Raises:
        CheckpointError: there is no plan in the checkpoint, or it is damaged.
        PlanError: the plan is for another model.
    """
    plan = load_plan(checkpoint)
    if plan is None:
        raise CheckpointError(f"{checkpoint} holds no pruning plan: it was not pruned. Resume with the model as it is.")
    if getattr(model.config, "pruning_config", None) is None or not agrees(plan, model.config):
        apply_plan_(model, infer_structure(model), plan)
