"""The whole job on one page: structure, scores, plan, surgery. The file to read first."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_prune.allocation.spectral import hill_exponents
from hf_prune.allocation.steps import Stage, for_pruned, in_dense_numbering, next_plan
from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.evaluation.latency import measure_latency
from hf_prune.methods import METHODS, check_scores, score
from hf_prune.methods.learned import LearnedScores
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan
from hf_prune.surgery.repair import repair_, select_repairable
from hf_prune.surgery.repair.preview import RepairPreview

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_prune.config import PruningConfig
    from hf_prune.latency import LatencyTable
    from hf_prune.methods.learned import Step
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

    @property
    def history(self) -> list[Step]:
        """How the scores were learned, step by step (see `LearnedScores`); empty where nothing was learned."""
        return history_of(self.scores)


def prune(
    model: PreTrainedModel,
    config: PruningConfig,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Calibration | None = None,
    batch_size: int = 8,
    latency: LatencyTable | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> PruningResult:
    """Prune a causal LM in memory. `model` itself is not changed.

    Args:
        model: any causal LM of transformers, its weights in memory.
        config: what to remove, and how.
        tokenizer: needed if `calibration` is text.
        calibration: for methods that need data: a text file, a Hub dataset, or batches with `input_ids` `[B, T]`.
        batch_size: windows per forward pass while scoring; does not change the result beyond rounding.
        latency: table of `measure_latency`, for the budget `latency` (default: measured where the model is).
        scores: scores of this model, if they are known (`PruningResult.scores` of a run at another ratio).

    Returns:
        The pruned model with its plan, structure and scores.

    Raises:
        HFPruneError: bad input, with what was found, what was expected and what to do; before anything is changed.
    """
    structure = infer_structure(model)
    batches = calibration_data(config, tokenizer, calibration, batch_size)
    if config.budget == "latency" and latency is None:
        latency = measure_latency(model, structure)
    plan, found = decide(model, structure, config, batches, latency=latency, scores=scores)
    pruned = carry_out(model, structure, plan, config, batches)
    if history := history_of(found):
        pruned._learning_history = plan, history  # type: ignore[assignment]  # for the picture in checkpoints
    logger.info("pruned %s: %.2f %% of the decoder removed", type(model).__name__, 100 * plan.achieved["decoder"])
    return PruningResult(pruned, plan, structure, found)


def decide(
    model: PreTrainedModel,
    structure: Structure,
    config: PruningConfig,
    batches: Sequence[Mapping[str, Any]] | None,
    *,
    latency: LatencyTable | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> tuple[PruningPlan, dict[str, Tensor]]:
    """The first half of `prune`: which units stay, and the scores of the dense model. See there.

    Step k of `config.num_steps` removes k/n of the ratio (LLM-Pruner's linear schedule); each is scored on the model
    that the one before leaves, repaired where `config` says so.
    """
    known: dict[str, Tensor] = {} if scores is None else check_scores(scores, structure, config)
    branches = {"layer_attention", "layer_mlp"} & set(config.axes)
    if branches and config.num_steps > 1 and getattr(config, "criterion", "fisher") != "fisher":
        raise ConfigError(  # these look for the weights of branches that are gone
            f"criterion: {config.criterion!r} with num_steps above 1 scores no {sorted(branches)}; use 'fisher'."  # type: ignore[attr-defined]
        )

    def scores_of(done: PruningPlan | None, step: int, ratio: float) -> dict[str, Tensor]:
        nonlocal known
        if done is None:
            if not known:
                own = dataclasses.replace(config, pruning_ratio=ratio, num_steps=1)
                known = score(model, structure, own, batches=batches)  # as it is: it may carry a history
            return known
        current = carry_out(model, structure, done, config, batches)
        task = for_pruned(structure, infer_structure(current), config, done, ratio)
        if task is None:
            return {}
        return in_dense_numbering(score(current, *task, batches=batches), structure, done)

    preview, exponents = None, None
    if config.allocation in ("spectral", "search"):
        exponents = hill_exponents(model, structure)
    if config.allocation == "search" and config.repair == "least_squares":  # judge plans as repair will leave them
        preview = RepairPreview(model, structure, batches or (), config.repair_ridge).applied
    stage: Stage | None = None
    for step in range(1, config.num_steps + 1):
        ratio = config.pruning_ratio * (step / config.num_steps)
        stage = next_plan(
            structure,
            config,
            partial(scores_of, step=step, ratio=ratio),
            stage,
            ratio,
            model=model,
            batches=batches,
            latency=latency,
            exponents=exponents,
            preview=preview,
            base_model_name_or_path=base_model_of(model),
        )
    assert stage is not None  # the last step reaches the ratio, or raises
    plan = stage.plan
    if config.selection == "obs":
        assert batches is not None
        plan = select_repairable(model, structure, plan, batches, ridge=config.repair_ridge)
    return plan, known


def carry_out(
    model: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    config: PruningConfig,
    batches: Sequence[Mapping[str, Any]] | None,
) -> PreTrainedModel:
    """The second half of `prune`: a new model without the units that `plan` removes, repaired as `config` says."""
    pruned = apply_plan(model, structure, plan)
    if config.repair != "none":
        data = batches if config.repair == "least_squares" else None
        target, ridge = config.repair_target, config.repair_ridge
        repair_(pruned, model, structure, plan, data, target=target, ridge=ridge, seed=config.seed)
    return pruned


def history_of(scores: Mapping[str, Tensor]) -> list[Step]:
    """The learning curve that `scores` carry; empty where nothing was learned."""
    return scores.history if isinstance(scores, LearnedScores) else []


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
    """Batches for what needs data: windows of a text, or the caller's own; `None` if nothing that was asked for does.

    Raises:
        CalibrationError: data is needed and none was given, or text was given without a tokenizer.
    """
    scored = config.method in METHODS and METHODS[config.method].needs_calibration  # `score` refuses unknown ones
    searched = config.allocation == "search"
    selected, repaired = config.selection != "scores", config.repair == "least_squares"
    if not (scored or searched or selected or repaired):
        return None
    if calibration is None:
        what = f"selection {config.selection!r}" if selected else f"repair {config.repair!r}"
        what = f"allocation {config.allocation!r}" if searched else what
        what = f"method {config.method!r}" if scored else what
        raise CalibrationError(f"{what} needs calibration text; pass a file, a dataset or batches.")
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
