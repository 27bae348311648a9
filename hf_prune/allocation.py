"""Scores + budget → plan.

Units go in one fixed sequence of steps that depends on scores, `axes`, `round_to`, `min_units`, `layers` and `protect`
but not on the ratio; the plan is the prefix of it whose removed fraction is nearest to the asked one. So for fixed
scores kept sets are nested as the ratio grows. Counts along the sequence are exact, also where axes multiply.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from hf_prune.config import PruningConfig, axes_of_kind, is_protected, layer_unit_names
from hf_prune.errors import BudgetError, StructureError
from hf_prune.methods import check_scores
from hf_prune.plan import PruningPlan, count_parameters, make_plan, vanishes
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from hf_prune.structure.structure import Axis, Structure

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SPLIT_ABOVE = 0.01
"""Uniform allocation takes a step in all layers at once unless that removes more than this fraction of the budget."""


@dataclass(frozen=True)
class _Ladder:
    """How one axis loses units: `order[: ends[k]]` are gone after step `k`."""

    axis: Axis
    order: Ints
    ends: Ints
    scores: Floats
    """Score of each step, summed over its units `[steps]`."""
    costs: Floats
    """Parameters of each step in the dense model `[steps]`."""
    step: int
    """Units of a full step."""
    unit_cost: float
    """Parameters of the dearest unit."""

    def removed(self, num_steps: int) -> Ints:
        return self.order[: self.ends[num_steps - 1] if num_steps else 0]


@dataclass(frozen=True)
class _State:
    """A point on the sequence: removed units per axis, and what that leaves."""

    kept: dict[str, tuple[int, ...]]
    widths: dict[str, int]
    layers: frozenset[int]
    branches: frozenset[tuple[int, str]]


def allocate(
    scores: Mapping[str, Tensor],
    structure: Structure,
    config: PruningConfig,
    *,
    base_model_name_or_path: str | None = None,
) -> PruningPlan:
    """Decide which units stay.

    Inside an axis the units with the lowest scores go first (ties: lower index first), `round_to` at a time.
    `uniform`: all axes lose the same fraction of their units, rounded down to whole steps; a step is taken in all
    layers at once, unless it is worth more than 1 % of the budget, then layers with lower scores go first (ties: lower
    layer first). `global`: steps compete across axes by score per parameter removed. Attention of layer 0 stays
    (caches are measured by it).

    Args:
        scores: float `[num_units]` for every axis of `selected_axes(structure, config)`, higher = keep.
        structure: structure of the dense model.
        config: ratio, budget and limits.
        base_model_name_or_path: recorded in the plan.

    Returns:
        The plan whose achieved ratio is nearest to the asked one.

    Raises:
        ScoreError: scores are missing, of the wrong shape, or not finite.
        StructureError: the model lacks a kind of axis asked for, or none of that kind can be pruned.
        ConfigError: `layers` or `protect` name what the model does not have.
        BudgetError: the ratio is out of reach, or so small that nothing would go.
    """
    checked = check_scores(scores, structure, config)
    _warn_blocked(structure, config)
    ladders = _ladders(checked, structure, config)
    if not any(len(ladder.ends) for ladder in ladders):
        raise _nothing_goes(config, "round_to, min_units, layers and protect leave no unit that may go")
    if config.budget == "units" and config.allocation == "uniform":
        taken = [_units_of_axis(ladder, config) for ladder in ladders]
        if not any(taken):
            raise _nothing_goes(config, "on every axis the nearest step is none at all")
    else:
        taken = _prefix(ladders, structure, config)
    kept = _state(ladders, taken, structure, indices=True).kept
    return make_plan(structure, kept, config, base_model_name_or_path)


def rounding(axis: Axis, config: PruningConfig) -> int:
    """Number that pruned widths of `axis` are multiples of: `multiple_of`; for MLP and hidden axes `round_to` too."""
    if axis.kind not in ("mlp", "hidden") or config.round_to is None:
        return axis.multiple_of
    if config.round_to == "auto":
        auto = next((multiple for multiple in (128, 64, 32, 16, 8) if 32 * multiple <= axis.num_units), 1)
        return max(auto, axis.multiple_of)
    return math.lcm(config.round_to, axis.multiple_of)


def _ladders(scores: Mapping[str, Tensor], structure: Structure, config: PruningConfig) -> list[_Ladder]:
    """One ladder per axis. A whole layer may go only where its branches may, so that floors hold for what is left."""
    axes = [structure.axes[name] for name in scores]
    costs = _unit_costs(structure, axes, "decoder" if config.budget == "decoder" else "model")
    found: dict[str, _Ladder] = {}
    must_stay: set[int] = set()
    for axis in sorted(axes, key=lambda axis: axis.name == "layers"):
        movable = np.ones(axis.num_units, dtype=bool)
        if axis.kind == "layer":
            movable[[unit for unit in range(axis.num_units) if not _may_go(structure, axis, unit, config)]] = False
        if axis.name == "layers":
            movable[list(must_stay)] = False
        ladder = _ladder(axis, scores[axis.name].double().numpy(), costs[axis.name], movable, config)
        if axis.kind == "layer":
            must_stay |= set(range(axis.num_units)) - set(ladder.removed(len(ladder.ends)).tolist())
        found[axis.name] = ladder
    return [found[axis.name] for axis in axes]


def _ladder(
    axis: Axis, scores: Floats, costs: Floats, movable: npt.NDArray[np.bool_], config: PruningConfig
) -> _Ladder:
    multiple = rounding(axis, config)
    order = np.argsort(scores, kind="stable").astype(np.int64)
    order = order[movable[order]]
    floor = math.ceil(config.min_units / multiple) * multiple
    most = min(len(order), axis.num_units - floor)
    first = axis.num_units % multiple or multiple
    ends = np.arange(first, most + 1, multiple, dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    return _Ladder(
        axis=axis,
        order=order,
        ends=ends,
        scores=_sums(scores[order], starts, ends),
        costs=_sums(costs[order], starts, ends),
        step=multiple,
        unit_cost=float(costs.max()),
    )


def _sums(values: Floats, starts: Ints, ends: Ints) -> Floats:
    total = np.concatenate([np.zeros(1), np.cumsum(values)])
    sums: Floats = total[ends] - total[starts]
    return sums


def _may_go(structure: Structure, axis: Axis, layer: int, config: PruningConfig) -> bool:
    """Whether this unit of a layer axis may be removed."""
    if config.layers is not None and layer not in config.layers:
        return False
    # Cache length and mask size are read from the first layer's cache: it must have attention.
    if layer == 0 and axis.name == "layers.attention":
        return False
    return not is_protected(config, *layer_unit_names(structure, axis.name, layer))


def _unit_costs(structure: Structure, axes: list[Axis], budget: Literal["decoder", "model"]) -> dict[str, Floats]:
    """Parameters that go with each unit of an otherwise dense model `[num_units]`."""
    carriers: dict[str, list[str]] = {axis.name: [] for axis in axes}
    owned = {name: np.zeros(axis.num_units) for name, axis in structure.axes.items() if axis.kind == "layer"}
    for name in structure.counted(budget):
        for axis_name in {axis_name for layout in structure.layouts[name] for axis_name in lay.axes(layout)}:
            if axis_name in carriers:
                carriers[axis_name].append(name)
        owner = structure.owners.get(name)
        for axis_name in ("layers", f"layers.{owner.branch}") if owner else ():
            if owner and axis_name in owned:
                owned[axis_name][owner.layer] += structure.numel(name)
    costs = {}
    for axis in axes:
        one_less = {axis.name: axis.num_units - 1}
        each = sum(structure.numel(name) - structure.numel(name, one_less) for name in carriers[axis.name])
        costs[axis.name] = owned.get(axis.name, np.full(axis.num_units, float(each)))
    return costs


def _prefix(ladders: list[_Ladder], structure: Structure, config: PruningConfig) -> list[int]:
    """Steps that each ladder takes in the nearest prefix of the sequence."""
    removed_at, base = _measure(ladders, structure, config)
    order, cuts = _uniform(ladders, base) if config.allocation == "uniform" else _global(ladders)
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    ranks = np.split(rank, np.cumsum([len(ladder.ends) for ladder in ladders])[:-1])

    def taken(cut: int) -> list[int]:
        return [int(np.searchsorted(own, cuts[cut])) for own in ranks] if cut >= 0 else [0] * len(ladders)

    def removed(cut: int) -> int:
        return removed_at(taken(cut))

    target = config.pruning_ratio * base
    most = removed(len(cuts) - 1)
    if target - most > _one_step_each(ladders, config) / 2:
        raise _out_of_reach(config, f"at most {most / base:.4f} of {config.budget}")
    best = _nearest(removed, len(cuts), target)
    if best < 0:
        raise _nothing_goes(config, f"the smallest step removes {removed(0) / base:.4f} of {config.budget}")
    return taken(best)


def _one_step_each(ladders: list[_Ladder], config: PruningConfig) -> float:
    """What one step on every axis that may lose units removes from the dense model, in parameters or units."""
    movable = [ladder for ladder in ladders if len(ladder.ends)]
    if config.budget != "units":
        return sum(ladder.step * ladder.unit_cost for ladder in movable)
    return sum(ladder.step + _units_inside(ladder, ladders) for ladder in movable)


def _units_inside(layer_ladder: _Ladder, ladders: list[_Ladder]) -> int:
    """Units of other axes that go with one unit of a layer axis, at most."""
    if layer_ladder.axis.kind != "layer":
        return 0
    branch = layer_ladder.axis.name.partition(".")[2]
    inside = 0
    for unit in layer_ladder.order.tolist():
        layers = frozenset[int]() if branch else frozenset({unit})
        going = [x.axis.num_units for x in ladders if vanishes(x.axis.name, layers, frozenset({(unit, branch)}))]
        inside = max(inside, sum(going))
    return inside + (0 if branch else sum(ladder.axis.kind == "layer" for ladder in ladders) - 1)


def _nearest(removed: Callable[[int], int], num_cuts: int, target: float) -> int:
    """The cut nearest to `target`, the earlier one of two; -1 if removing nothing is nearest."""
    low, high = -1, num_cuts - 1  # removed(low) < target; the first cut that reaches it is in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if removed(middle) >= target else (middle, high)
    return high if abs(removed(high) - target) < abs(removed(low) - target) else low


def _measure(
    ladders: list[_Ladder], structure: Structure, config: PruningConfig
) -> tuple[Callable[[list[int]], int], int]:
    """How much a prefix removes, and how much there is: parameters, or units of the selected axes."""

    def remaining(taken: list[int]) -> int:
        state = _state(ladders, taken, structure)
        if config.budget == "units":
            return sum(state.widths[ladder.axis.name] for ladder in ladders)
        return count_parameters(structure, state.widths, state.layers, state.branches, config.budget)

    base = remaining([0] * len(ladders))
    if base == 0:
        raise StructureError(
            f"this {structure.model_type} model has no {config.budget} parameters to count; use budget 'model'."
        )
    return lambda taken: base - remaining(taken), base


def _global(ladders: list[_Ladder]) -> tuple[Ints, Ints]:
    """Sequence by score per parameter, lower first, and where it may be cut: anywhere."""
    values = [np.maximum.accumulate(ladder.scores / np.maximum(ladder.costs, 1)) for ladder in ladders]
    order = np.argsort(np.concatenate(values), kind="stable")
    return order, np.arange(1, len(order) + 1)


def _uniform(ladders: list[_Ladder], base: int) -> tuple[Ints, Ints]:
    """Sequence by fraction removed, and where it may be cut: between groups of equal steps, and inside dear ones."""
    labels: dict[tuple[str, int], int] = {}
    groups = []
    for ladder in ladders:
        kind = ladder.axis.kind if ladder.axis.layer is not None else ladder.axis.name
        groups.append(labels.setdefault((kind, ladder.axis.num_units), len(labels)))
    num_steps = [len(ladder.ends) for ladder in ladders]
    # A step is due once the fraction covers it whole: of 4 KV groups none goes at 20 %, finer axes make up for it.
    position = np.concatenate([ladder.ends / ladder.axis.num_units for ladder in ladders])
    group = np.repeat(groups, num_steps)
    score = np.concatenate([ladder.scores for ladder in ladders])
    cost = np.concatenate([ladder.costs for ladder in ladders])
    order = np.lexsort((score, group, position))  # stable, so ties keep the order of the axes
    position, group, cost = position[order], group[order], cost[order]
    last = np.append((np.diff(position) != 0) | (np.diff(group) != 0), True)
    first = np.flatnonzero(np.append(True, last[:-1]))
    group_cost = np.add.reduceat(cost, first)
    dear = np.repeat(group_cost > SPLIT_ABOVE * base, np.diff(np.append(first, len(order))))
    return order, np.flatnonzero(last | dear) + 1


def _units_of_axis(ladder: _Ladder, config: PruningConfig) -> int:
    """Steps that bring one axis nearest to `n - round(n · (1 - ratio))` removed units, the papers' meaning."""
    total = ladder.axis.num_units
    target = total - round(total * (1 - config.pruning_ratio))
    reached = np.append(0, ladder.ends)
    steps = int(np.abs(reached - target).argmin())
    if target - reached[steps] > ladder.step:
        raise _out_of_reach(config, f"{int(reached[-1])} of {total} units of {ladder.axis.name}")
    return steps


def _state(ladders: list[_Ladder], taken: list[int], structure: Structure, *, indices: bool = False) -> _State:
    """What stays after these steps; kept indices only for layer axes unless `indices` asks for all."""
    kept: dict[str, tuple[int, ...]] = {}
    widths = dict(structure.widths)
    gone: dict[str, frozenset[int]] = {}
    for ladder, steps in zip(ladders, taken, strict=True):
        removed = ladder.removed(steps)
        widths[ladder.axis.name] -= len(removed)
        if ladder.axis.kind == "layer":
            gone[ladder.axis.name] = frozenset(removed.tolist())
        if len(removed) and (indices or ladder.axis.kind == "layer"):
            stays = np.ones(ladder.axis.num_units, dtype=bool)
            stays[removed] = False
            kept[ladder.axis.name] = tuple(np.flatnonzero(stays).tolist())
    layers = gone.get("layers", frozenset())
    branches = frozenset(
        (layer, branch)
        for branch in ("attention", "mlp")
        for layer in gone.get(f"layers.{branch}", frozenset()) - layers
    )
    for name in widths if layers or branches else ():
        if vanishes(name, layers, branches):
            widths[name] = 0
            kept.pop(name, None)
    for branch in ("attention", "mlp") if layers else ():
        name = f"layers.{branch}"
        if name in kept:
            kept[name] = tuple(layer for layer in kept[name] if layer not in layers)
            widths[name] = len(kept[name])
        elif name in widths:
            widths[name] -= len(layers)
    return _State(kept, widths, layers, branches)


def _warn_blocked(structure: Structure, config: PruningConfig) -> None:
    for kind in config.axes:
        for axis in axes_of_kind(structure, kind):
            if not axis.prunable:
                logger.warning("%s stays whole: %s", axis.name, axis.blocker or f"it has {axis.num_units} unit")


def _nothing_goes(config: PruningConfig, reason: str) -> BudgetError:
    return BudgetError(
        f"pruning_ratio={config.pruning_ratio} of {config.budget} would remove nothing: {reason}. "
        "Ask for a larger ratio or more axes, or relax round_to, min_units, layers or protect."
    )


def _out_of_reach(config: PruningConfig, reachable: str) -> BudgetError:
    return BudgetError(
        f"pruning_ratio={config.pruning_ratio} of {config.budget} is out of reach: axes={config.axes}, "
        f"round_to={config.round_to}, min_units={config.min_units}, layers={config.layers} and "
        f"protect={config.protect} let go {reachable}. Ask for less, for more axes, or relax these limits."
    )
