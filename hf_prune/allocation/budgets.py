"""Budgets: what a ratio is a fraction of, what each unit costs in it, and how much some steps remove."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_prune.allocation.ladders import state_after
from hf_prune.errors import BudgetError, ConfigError, StructureError
from hf_prune.memory import bytes_of, cache_bytes, count_memory
from hf_prune.plan import count_parameters, vanishes
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from collections.abc import Callable

    from hf_prune.allocation.ladders import Floats, RemovalOrder
    from hf_prune.config import PruningConfig
    from hf_prune.latency import LatencyTable
    from hf_prune.structure.axes import Axis, Counted, Structure
    from hf_prune.structure.layouts import Widths


@dataclass(frozen=True)
class BudgetMeter:
    """A budget: parameters, units of the selected axes, nanoseconds of a request, or bytes."""

    base: float
    """All there is in the dense model."""
    removed: Callable[[list[int]], float]
    """What is gone after so many steps of each ladder; exact, also where axes multiply."""
    one_step_each: float
    """What one step on every axis that may lose units removes from the dense model, at most."""


def spending_of(
    ladders: list[RemovalOrder], structure: Structure, config: PruningConfig, latency: LatencyTable | None
) -> BudgetMeter:
    """How `config.budget` counts what these ladders remove.

    Raises:
        StructureError: the model has nothing that the budget counts.
    """

    def remaining(taken: list[int]) -> float:
        state = state_after(ladders, taken, structure)
        if config.budget == "units":
            return sum(state.widths[ladder.axis.name] for ladder in ladders)
        if config.budget == "latency":
            assert latency is not None
            return 1e9 * latency.predict(state.widths, state.layers, state.branches).total_s
        if config.budget == "memory":
            return count_memory(structure, config, state.widths, state.layers, state.branches).total
        return count_parameters(structure, state.widths, state.layers, state.branches, config.budget)

    base = remaining([0] * len(ladders))
    if base <= 0:
        raise StructureError(
            f"this {structure.model_type} model has no {config.budget} parameters to count; use budget 'model'."
        )
    return BudgetMeter(base, lambda taken: base - remaining(taken), _one_step_each(ladders, config))


def unit_costs(
    structure: Structure, axes: list[Axis], config: PruningConfig, latency: LatencyTable | None
) -> dict[str, Floats]:
    """What goes with each unit of an otherwise dense model `[num_units]`: parameters, nanoseconds, or bytes.

    Raises:
        ConfigError: `budget="latency"` without a table, or for the hidden axis or query heads inside of KV groups.
        PlanError: the table was measured on another model.
    """
    if config.budget == "memory":
        weights = _parameters(structure, axes, "model", lambda name, widths: bytes_of(structure, name, config, widths))
        return {axis.name: weights[axis.name] + _cache(structure, axis, config) for axis in axes}
    if config.budget != "latency":
        counted: Counted = "model" if config.budget == "units" else config.budget
        return _parameters(structure, axes, counted, structure.size_in(counted))
    if latency is None:
        raise ConfigError("budget 'latency' needs a table of measured latencies: pass one from `measure_latency`.")
    for axis in axes:
        if axis.kind == "hidden" or axis.is_inner:
            raise ConfigError(f"budget 'latency' cannot price {axis.name}: use another budget, or other axes.")
    latency.check(structure)
    return {axis.name: 1e9 * latency.seconds_per_unit(axis.name, axis.num_units) for axis in axes}


def _cache(structure: Structure, axis: Axis, config: PruningConfig) -> Floats:
    """Bytes of the cache that go with each unit `[num_units]`."""
    dense = cache_bytes(structure, config)
    if axis.kind != "layer":
        less = cache_bytes(structure, config, {axis.name: axis.num_units - axis.num_blocks})
        return np.full(axis.num_units, (dense - less) / axis.num_blocks)
    branch = axis.name.partition(".")[2]
    left = []
    for layer in range(axis.num_units):
        layers = frozenset[int]() if branch else frozenset({layer})
        left.append(cache_bytes(structure, config, None, layers, frozenset({(layer, branch)})))
    return float(dense) - np.array(left, dtype=np.float64)


def _parameters(
    structure: Structure,
    axes: list[Axis],
    budget: Counted,
    size: Callable[[str, Widths], int],
) -> dict[str, Floats]:
    carriers: dict[str, list[str]] = {axis.name: [] for axis in axes}
    owned = {name: np.zeros(axis.num_units) for name, axis in structure.axes.items() if axis.kind == "layer"}
    for name in structure.counted(budget):
        for axis_name in {axis_name for layout in structure.layouts[name] for axis_name in lay.axes(layout)}:
            if axis_name in carriers:
                carriers[axis_name].append(name)
        owner = structure.owners.get(name)
        for axis_name in ("layers", f"layers.{owner.branch}") if owner else ():
            if owner and axis_name in owned:
                owned[axis_name][owner.layer] += size(name, {})
    costs = {}
    for axis in axes:
        less = {axis.name: axis.num_units - axis.num_blocks}
        each = sum(size(name, {}) - size(name, less) for name in carriers[axis.name]) / axis.num_blocks
        costs[axis.name] = owned.get(axis.name, np.full(axis.num_units, each))
    return costs


def _one_step_each(ladders: list[RemovalOrder], config: PruningConfig) -> float:
    movable = [ladder for ladder in ladders if len(ladder.step_ends)]
    if config.budget != "units":
        return sum(ladder.step * ladder.unit_cost for ladder in movable)
    return sum(ladder.step + _units_inside(ladder, ladders) for ladder in movable)


def _units_inside(layer_ladder: RemovalOrder, ladders: list[RemovalOrder]) -> int:
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


def ratio_too_small(config: PruningConfig, reason: str) -> BudgetError:
    """The error for a ratio so small that no unit would be removed."""
    return BudgetError(
        f"pruning_ratio={config.pruning_ratio} of {config.budget} would remove nothing: {reason}. "
        "Ask for a larger ratio or more axes, or relax round_to, min_units, layers or protect."
    )


def ratio_unreachable(config: PruningConfig, reachable: str) -> BudgetError:
    """The error for a ratio that the limits do not allow."""
    return BudgetError(
        f"pruning_ratio={config.pruning_ratio} of {config.budget} is out of reach: axes={config.axes}, "
        f"round_to={config.round_to}, min_units={config.min_units}, targets={config.targets}, layers={config.layers} "
        f"and protect={config.protect} let go {reachable}. Ask for less, for more axes, or relax these limits."
    )
