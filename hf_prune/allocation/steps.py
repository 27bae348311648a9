"""Prune step by step, by `num_steps` or while training: each step scores what is left and takes more of it.

Plans and scores are in the numbering of the dense model throughout.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_prune.config import LAYER_AXES, PruningConfig, axes_of_kind, is_protected
from hf_prune.errors import BudgetError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure


@dataclass(frozen=True)
class Stage:
    """What is decided so far, and by which scores."""

    plan: PruningPlan
    """What goes, for the dense model."""
    scores: dict[str, Tensor]
    """Axis → last score of each unit of the dense model `[num_units]`: of one that is gone, that at which it went."""


def next_plan(
    allocate: Callable[..., PruningPlan],
    config: PruningConfig,
    score: Callable[[PruningPlan | None], Mapping[str, Tensor]],
    done: Stage | None,
    ratio: float,
) -> Stage | None:
    """Take the next step: what `done` removes, and more, until `ratio` of the dense model is gone.

    The mean, the deviation and the sum of an axis's scores are those of all units of the dense model: a unit that is
    gone counts with the score at which it went. So where scores do not change the steps do not matter: the plan is the
    one that `allocate` makes at once (except by allocation `search`, which is no fixed sequence).

    Args:
        allocate: `planning.allocate` with all of its arguments but scores, `config` and `gone`.
        config: what was asked; its own ratio is the final one.
        score: scores of what the plan it is given leaves (`None`: of the dense model), `[num_units]` per selected axis.
            Entries of units that are gone do not matter, NaN included, nor do those of −∞; an axis that is missing
            keeps its last scores.
        done: the step before, if any.
        ratio: fraction of the dense model that is to be gone after this step.

    Returns:
        The new state; `None` if nothing is gone yet, and the ratio, below the final one, too small to remove anything.

    Raises:
        HFPruneError: see `allocate`.
    """
    scores = dict(score(None if done is None else done.plan))
    if done is not None:
        scores = _with_last_scores(scores, done)
    try:
        asked = dataclasses.replace(config, pruning_ratio=ratio)
        plan = allocate(scores, config=asked, gone=None if done is None else done.plan)
    except BudgetError:
        if done is None and ratio < config.pruning_ratio:
            return None  # the first steps of a schedule may be smaller than one unit
        raise
    return Stage(plan, scores)


def _with_last_scores(scores: Mapping[str, Tensor], done: Stage) -> dict[str, Tensor]:
    found = {**done.scores, **scores}
    for name, last in done.scores.items():
        if name in scores and scores[name].shape == last.shape:
            gone = torch.zeros(len(last), dtype=torch.bool)
            gone[gone_units(done.plan, name)] = True
            found[name] = torch.where(gone | scores[name].isneginf(), last, scores[name].detach().to(last))
    return found


def gone_units(plan: PruningPlan, axis: str) -> list[int]:
    """Units of `axis` that the plan removes, those of removed layers included."""
    everything = range(plan.num_units.get(axis, 0))  # none of an axis that cannot be pruned
    gone = set(everything) - set(() if axis in plan.vanished_axes else plan.kept_indices.get(axis, everything))
    if axis in LAYER_AXES.values():
        gone |= plan.removed_layers
    return sorted(gone)


def for_pruned(
    structure: Structure, now: Structure, config: PruningConfig, done: PruningPlan, ratio: float
) -> tuple[Structure, PruningConfig] | None:
    """What a method is given to score a model that is pruned already, in that model's own numbering.

    Args:
        structure: structure of the dense model.
        now: structure of the model that `done` gives.
        config: what was asked of the dense model.
        done: what is gone.
        ratio: fraction of the dense model that is to be gone after the next step.

    Returns:
        `now`, in which a branch that is gone does not keep the others from being scored; and `config` for it: the share
        that is still to go, and limits by name. `None` if nothing more is to go, or can be scored.
    """
    removed = done.achieved[config.budget]
    asked = (ratio - removed) / (1 - removed)
    stay = _remaining_layers(structure, done)
    branches = {f"layers.{branch}" for _, branch in done.removed_branches}
    opened = {name: dataclasses.replace(axis, blocker="") for name, axis in now.axes.items() if name in branches}
    modules = {
        f"layers.{new}.{branch}": structure.branch_modules[f"layers.{old}.{branch}"]
        for new, old in enumerate(stay)
        for branch in ("attention", "mlp")
        if (old, branch) in done.removed_branches
    }
    now = dataclasses.replace(now, axes={**now.axes, **opened}, branch_modules={**now.branch_modules, **modules})
    kinds = tuple(kind for kind in config.axes if any(axis.prunable for axis in axes_of_kind(now, kind)))
    if asked <= 0 or not kinds:
        return None

    def stays_whole(name: str) -> bool:
        layer = _layer_of(name)
        outside = layer is not None and config.layers is not None and stay[layer] not in config.layers
        return outside or is_protected(config, _dense_name(name, stay))

    names = [f"layers.{new}{branch}" for new in range(len(stay)) for branch in ("", ".attention", ".mlp")]
    protect = tuple(name for name in dict.fromkeys([*names, *now.axes]) if stays_whole(name))
    own = dataclasses.replace(config, pruning_ratio=asked, axes=kinds, num_steps=1, layers=None, protect=protect)
    return now, own


def in_dense_numbering(scores: Mapping[str, Tensor], structure: Structure, done: PruningPlan) -> dict[str, Tensor]:
    """Scores of the model that `done` gives, put where its units are in the dense one.

    NaN for those that are gone, −∞ for those that are gone with the units of another axis that they were parts of.
    """
    stay = _remaining_layers(structure, done)
    found = {}
    for name, values in scores.items():
        dense = _dense_name(name, stay)
        axis, num_units = structure.axes[dense], structure.axes[dense].num_units
        kept = stay if name in LAYER_AXES.values() else done.kept_indices.get(dense, range(num_units))
        blocks = set(done.kept_indices.get(axis.block, range(axis.num_blocks)))
        kept = [unit for unit in kept if unit * axis.num_blocks // num_units in blocks]
        found[dense] = torch.full((num_units,), -torch.inf if axis.is_inner else torch.nan)
        # of one KV group that is left the units are its query heads; in the dense model they are one unit
        found[dense][kept] = values.detach().to("cpu", torch.float32).view(len(kept), -1).sum(1)
    return found


def _remaining_layers(structure: Structure, plan: PruningPlan) -> list[int]:
    return [layer for layer in range(len(structure.layer_paths)) if layer not in plan.removed_layers]


def _layer_of(name: str) -> int | None:
    number = name.split(".")[1] if name.startswith("layers.") else ""
    return int(number) if number.isdigit() else None


def _dense_name(name: str, stay: list[int]) -> str:
    """The name that an axis or a layer of the pruned model has in the dense one."""
    layer = _layer_of(name)
    return name if layer is None else ".".join(["layers", str(stay[layer]), *name.split(".")[2:]])
