"""The whole job on one page: structure, scores, plan, surgery. The file to read first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_prune.errors import CalibrationError
from hf_prune.iterative import plan_in_steps
from hf_prune.methods import METHODS, score
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.config import PruningConfig
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.structure import Structure

logger = logging.getLogger(__name__)

Calibration = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PruningResult:
    """A pruned model and how it came about."""

    model: PreTrainedModel
    """The pruned model: the same class as the dense one."""
    plan: PruningPlan
    """Which units stay, and the achieved ratios."""
    structure: Structure
    """Structure of the dense model."""
    scores: dict[str, Tensor]
    """Score of every unit of the dense model, higher = keep: a plan at another ratio needs no new scoring."""


def prune(
    model: PreTrainedModel,
    config: PruningConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | None = None,
    batch_size: int = 8,
) -> PruningResult:
    """Prune a causal LM in memory. `model` itself is not changed.

    Args:
        model: any causal LM of transformers, its weights in memory.
        config: what to remove, and how.
        tokenizer: needed if `calibration` is text.
        calibration: for methods that need data: a text file, a Hub dataset, or batches with `input_ids` `[B, T]`.
        batch_size: windows per forward pass while scoring; does not change the result beyond rounding.

    Returns:
        The pruned model with its plan, structure and scores.

    Raises:
        HFPruneError: bad input, with what was found, what was expected and what to do; before anything is changed.
    """
    structure = infer_structure(model)
    batches = calibration_data(config, tokenizer, calibration, batch_size)
    scores: dict[str, Tensor] = {}

    def step(current: PreTrainedModel, now: Structure, own: PruningConfig) -> dict[str, Tensor]:
        found = score(current, now, own, batches=batches)
        scores.update(found if current is model else {})
        return found

    plan = plan_in_steps(model, structure, config, step, base_model_of(model))
    pruned = apply_plan(model, structure, plan)
    logger.info("pruned %s: %.2f %% of the decoder removed", type(model).__name__, 100 * plan.achieved["decoder"])
    return PruningResult(pruned, plan, structure, scores)


def base_model_of(model: PreTrainedModel) -> str | None:
    """Where the dense model came from: a directory or Hub id; `None` for a model made in memory."""
    pruned = getattr(model.config, "pruning_config", None) or {}
    return pruned.get("base_model_name_or_path") or model.config._name_or_path or None


def calibration_data(
    config: PruningConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Calibration | None,
    batch_size: int,
) -> Sequence[Mapping[str, Any]] | None:
    """Batches for scoring: `None` if the method needs none, windows of a text, or the caller's own batches.

    Raises:
        CalibrationError: the method needs data and none was given, or text was given without a tokenizer.
    """
    if config.method not in METHODS or not METHODS[config.method].needs_calibration:
        return None  # an unknown method is refused by `score`
    if calibration is None:
        raise CalibrationError(f"method {config.method!r} needs calibration text; pass a file, a dataset or batches.")
    if not isinstance(calibration, str):
        return calibration
    if tokenizer is None:
        raise CalibrationError("calibration text needs a tokenizer; pass the model's own.")
    from hf_prune.data import calibration_batches

    return calibration_batches(
        tokenizer,
        calibration,
        num_samples=config.num_samples,
        seq_len=config.seq_len,
        batch_size=batch_size,
        seed=config.seed,
    )
