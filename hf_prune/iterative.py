"""Prune in several steps: scores are recomputed on the pruned model before each, and all decisions end in one plan.

Where the configuration asks for repair, the pruned model is repaired before it is scored again.
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, get_args

from hf_prune.allocation import allocate
from hf_prune.config import LAYER_AXES, AxisKind, PruningConfig, is_protected, layer_unit_names, selected_axes
from hf_prune.errors import ConfigError
from hf_prune.plan import PruningPlan, make_plan
from hf_prune.repair.preview import RepairPreview
from hf_prune.structure.inference import infer_structure

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from hf_prune.latency import LatencyTable
    from hf_prune.layers.walk import Batch
    from hf_prune.layers.work import WorkDir
    from hf_prune.structure.structure import Axis, Structure

Scores = dict[str, "Tensor"]


def plan_in_steps(
    model: PreTrainedModel,
    structure: Structure,
    config: PruningConfig,
    score: Callable[[PreTrainedModel, Structure, PruningConfig], Scores],
    base_model_name_or_path: str | None,
    *,
    carry_out: Callable[[PruningPlan], PreTrainedModel],
    batches: Sequence[Batch] | None = None,
    latency: LatencyTable | None = None,
    work: WorkDir | None = None,
) -> PruningPlan:
    """A plan for the dense `model`, found in `config.num_steps` equal steps (LLM-Pruner's linear schedule).

    Args:
        model: the dense model; not changed.
        structure: its structure.
        config: the final ratio; step k of n removes k/n of it.
        score: scores of the selected axes of the model it is given.
        base_model_name_or_path: recorded in the plan.
        carry_out: gives the pruned (and repaired) model of a plan for the dense one.
        batches: calibration batches, for allocation `search`.
        latency: table of the dense model, for the budget `latency`.
        work: keeps what a search measured.

    Raises:
        ConfigError: several steps asked for axes whose removed units leave nothing to score next time, or for the
            budget `latency`, whose table holds for the dense model only.
        BudgetError: a step is too small to remove anything.
    """
    if config.num_steps > 1 and {"layer_attention", "layer_mlp"} & set(config.axes):
        raise ConfigError("num_steps above 1 does not go with 'layer_attention' or 'layer_mlp'; use one step for them.")
    if config.num_steps > 1 and config.budget == "latency":
        raise ConfigError("num_steps above 1 does not go with budget 'latency'; use one step, or another budget.")
    done: PruningPlan | None = None
    for step in range(1, config.num_steps + 1):
        current = model if done is None else carry_out(done)
        now = structure if done is None else infer_structure(current)
        removed = 0.0 if done is None else done.achieved[config.budget]
        asked = (config.pruning_ratio * step / config.num_steps - removed) / (1 - removed)
        if asked <= 0:
            continue
        own = _for_current(config, structure, now, done, asked)
        scores = score(current, now, own)
        preview = None
        if own.allocation == "search" and own.repair == "least_squares":  # judge plans as repair will leave them
            preview = RepairPreview(current, now, batches or (), own.repair_ridge).applied
        plan = allocate(
            scores,
            now,
            own,
            model=current,
            batches=batches,
            latency=latency if config.num_steps == 1 else None,
            preview=preview,
            work=work,
            base_model_name_or_path=base_model_name_or_path,
        )
        done = plan if config.num_steps == 1 else compose(structure, config, done, plan)
    assert done is not None
    return done


def compose(structure: Structure, config: PruningConfig, first: PruningPlan | None, second: PruningPlan) -> PruningPlan:
    """The plan for the dense model that does what `first`, and then `second` on its result, do.

    Args:
        structure: structure of the dense model.
        config: recorded as what was asked.
        first: plan for the dense model; `None`: nothing yet.
        second: plan for the model that `first` gives.
    """
    before = first.kept_indices if first is not None else {}
    stay = _remaining_layers(structure, first)
    kept = {name: units for name, units in before.items() if name not in LAYER_AXES.values()}
    for name, units in second.kept_indices.items():
        dense = _dense_name(name, stay)
        earlier = before.get(dense)
        if name in LAYER_AXES.values():
            kept[name] = tuple(stay[unit] for unit in units)
        else:
            kept[dense] = tuple(units) if earlier is None else tuple(earlier[unit] for unit in units)
    for name in LAYER_AXES.values():
        if name in before and name not in kept:
            kept[name] = before[name]
    layers = frozenset(range(len(structure.layer_paths))) - frozenset(
        kept.get("layers", range(len(structure.layer_paths)))
    )
    kept = {name: units for name, units in kept.items() if structure.axes[name].layer not in layers}
    return make_plan(structure, kept, config, second.base_model_name_or_path)


def _remaining_layers(structure: Structure, plan: PruningPlan | None) -> list[int]:
    gone = plan.removed_layers if plan is not None else frozenset()
    return [layer for layer in range(len(structure.layer_paths)) if layer not in gone]


def _dense_name(name: str, stay: list[int]) -> str:
    """The name that an axis of the pruned model has in the dense one."""
    _, number, *rest = name.split(".", 2) if name.startswith("layers.") else (name, "")
    return f"layers.{stay[int(number)]}.{rest[0]}" if number.isdigit() else name


def _for_current(
    config: PruningConfig, structure: Structure, now: Structure, done: PruningPlan | None, asked: float
) -> PruningConfig:
    """`config` in the numbering of the partly pruned model, asking for the share of this step."""
    if done is None:
        return dataclasses.replace(config, pruning_ratio=asked, num_steps=1)
    stay = _remaining_layers(structure, done)
    layers = None if config.layers is None else tuple(new for new, old in enumerate(stay) if old in config.layers)
    protect = tuple(
        name
        for name, axis in now.axes.items()
        if axis.layer is not None and is_protected(config, _dense_name(name, stay))
    )
    protect += tuple(
        f"layers.{new}"
        for new, old in enumerate(stay)
        if is_protected(config, *layer_unit_names(structure, "layers", old))
    )
    protect += tuple(name for name in ("hidden",) if is_protected(config, name))
    own = dataclasses.replace(config, pruning_ratio=asked, num_steps=1, layers=layers, protect=protect)
    if not isinstance(config.allocation, tuple):
        return own
    return dataclasses.replace(own, allocation=_mapping_for_current(config.allocation, selected_axes(now, own), stay))


def _mapping_for_current(
    mapping: tuple[tuple[str, float], ...], axes: list[Axis], stay: list[int]
) -> tuple[tuple[str, float], ...]:
    """A mapping with the names that axes have now in place of patterns; patterns that fit nothing any more go."""
    found: dict[str, float] = {}
    for pattern, weight in mapping:
        if pattern in get_args(AxisKind):
            found.setdefault(pattern, weight)
            continue
        for axis in axes:
            if fnmatchcase(_dense_name(axis.name, stay), pattern):
                found.setdefault(axis.name, weight)
    return tuple(found.items())
