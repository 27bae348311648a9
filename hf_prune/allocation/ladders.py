"""Ladders: in which steps each axis loses its units, what a step costs, and what stays after some steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hf_prune.config import PruningConfig, multiple_for, removable
from hf_prune.errors import ConfigError
from hf_prune.plan import vanishes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Axis, Structure

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RemovalOrder:
    """Order in which an axis's units are removed: `order[: step_ends[k]]` are gone after step `k`."""

    axis: Axis
    order: Ints
    """Units that may go, lowest score first."""
    step_ends: Ints
    scores: Floats
    """Score of each step, summed over its units `[steps]`."""
    costs: Floats
    """Cost of each step in the dense model, in what the budget counts `[steps]`."""
    mean: float
    """Mean score of all units of the axis."""
    deviation: float
    """Standard deviation of the scores of all units of the axis."""
    step: int
    """Units of a full step."""
    unit_cost: float
    """Cost of the most expensive unit."""
    total_cost: float
    """Cost of all units of the axis."""
    num_taken: int = 0
    """The first steps, taken by an earlier plan: every plan takes them."""
    tie: str = ""
    """Ladders of the same name take their steps together; empty: on its own."""

    def removed(self, num_steps: int) -> Ints:
        """Units that are gone after so many steps."""
        return self.order[: self.step_ends[num_steps - 1] if num_steps else 0]

    def without_steps(self) -> RemovalOrder:
        """The ladder of an axis that stays whole."""
        none = np.zeros(0)
        return replace(self, step_ends=np.zeros(0, np.int64), scores=none, costs=none, num_taken=0)


@dataclass(frozen=True)
class AllocationState:
    """Widths after some removal steps: kept units of axes that lose some, and what that leaves."""

    kept: dict[str, tuple[int, ...]]
    widths: dict[str, int]
    layers: frozenset[int]
    branches: frozenset[tuple[int, str]]


def rounding(axis: Axis, config: PruningConfig, structure: Structure) -> int:
    """Number that pruned widths of `axis` are multiples of: what the model, the targets and `round_to` ask for.

    Of an axis in blocks, a multiple for each block.
    """
    needed = math.lcm(axis.multiple_of, multiple_for(config.target, structure, axis))
    if axis.kind not in ("mlp", "expert_channels", "hidden") or config.round_to is None:
        return needed * axis.num_blocks
    if config.round_to == "auto":
        num_units = axis.num_units // axis.num_blocks
        auto = next((multiple for multiple in (128, 64, 32, 16, 8) if 32 * multiple <= num_units), 1)
        return math.lcm(auto, needed) * axis.num_blocks
    return math.lcm(config.round_to, needed) * axis.num_blocks


def make_ladders(
    scores: Mapping[str, Tensor],
    costs: Mapping[str, Floats],
    structure: Structure,
    config: PruningConfig,
    gone: PruningPlan | None = None,
) -> list[RemovalOrder]:
    """One ladder per axis of `scores`; `costs` are those of each unit `[num_units]`.

    A whole layer may go only where its branches may, so that floors hold for what is left. What `gone` removes comes
    first on its ladder, as steps that are taken; the axes of a layer that is gone cost nothing and stay as they are.
    """
    axes = [structure.axes[name] for name in scores]
    found: dict[str, RemovalOrder] = {}
    frozen: set[int] = set()
    for axis in sorted(axes, key=lambda axis: axis.name == "layers"):
        movable = np.ones(axis.num_units, dtype=bool)
        if axis.kind == "layer":
            movable[[unit for unit in range(axis.num_units) if not removable(structure, config, axis.name, unit)]] = (
                False
            )
        if axis.name == "layers":
            movable[list(frozen)] = False
        taken = np.zeros(axis.num_units, dtype=bool)
        taken[sorted(_taken(gone, axis))] = True
        before = taken.copy()
        if axis.kind == "layer" and gone is not None:
            before[sorted(gone.removed_layers)] = True  # their branches count as going first, whatever their scores
        values = scores[axis.name].double().numpy()
        multiple = rounding(axis, config, structure)
        ladder = _ladder(axis, values, costs[axis.name], movable | before, config, taken, before, multiple)
        if axis.kind == "layer":
            frozen |= set(range(axis.num_units)) - set(ladder.removed(len(ladder.step_ends)).tolist())
        found[axis.name] = ladder
    ladders = [found[axis.name] for axis in axes]
    return _tied(ladders, structure, config)


def _tied(ladders: list[RemovalOrder], structure: Structure, config: PruningConfig) -> list[RemovalOrder]:
    """The ladders, those of one family tied where the target asks for it: steps count as the mean of the family's.

    Raises:
        ConfigError: a layer has no such axis that may lose units, or another number of them.
    """
    families: dict[str, list[RemovalOrder]] = {}
    for ladder in ladders:
        if ladder.axis.layer is not None and ladder.axis.kind in config.target.uniform:
            families.setdefault(ladder.axis.name.split(".", 2)[2], []).append(ladder)
    tied = {}
    for family, members in families.items():
        everywhere = [
            axis for name, axis in structure.axes.items() if re.fullmatch(rf"layers\.\d+\.{re.escape(family)}", name)
        ]
        if len(members) < len(everywhere) or len({axis.num_units for axis in everywhere}) > 1:
            raise ConfigError(
                f"{config.target.text}; but of {len(everywhere)} axes {family!r} {len(members)} may lose units, of "
                f"{sorted({axis.num_units for axis in everywhere})} units. Ask for other axes, or relax layers and "
                "protect."
            )
        scores, costs = (np.mean([getattr(m, name) for m in members], axis=0) for name in ("scores", "costs"))
        mean, deviation = (float(np.mean([getattr(m, name) for m in members])) for name in ("mean", "deviation"))
        for member in members:
            tied[member.axis.name] = replace(
                member, scores=scores, costs=costs, mean=mean, deviation=deviation, tie=family
            )
    return [tied.get(ladder.axis.name, ladder) for ladder in ladders]


def _taken(gone: PruningPlan | None, axis: Axis) -> frozenset[int]:
    """Units that `gone` removes by themselves: not those that go with their layer or branch."""
    if gone is None or axis.name in gone.vanished_axes:
        return frozenset()
    if axis.name == "layers":
        return gone.removed_layers
    if axis.kind == "layer":
        return frozenset(layer for layer, branch in gone.removed_branches if axis.name == f"layers.{branch}")
    return frozenset(range(axis.num_units)) - frozenset(gone.kept_indices.get(axis.name, range(axis.num_units)))


def _ladder(
    axis: Axis,
    scores: Floats,
    costs: Floats,
    movable: Bools,
    config: PruningConfig,
    taken: Bools,
    before: Bools,
    multiple: int,
) -> RemovalOrder:
    floor = math.ceil(max(config.min_units, axis.least) * axis.num_blocks / multiple) * multiple
    most = min(int(movable.sum()), axis.num_units - floor)
    first = axis.num_units % multiple or multiple
    order = _order(axis, scores, ~before)
    removable = np.zeros(axis.num_units, dtype=bool)
    removable[order[movable[order]][:most]] = True
    order = _order(axis, scores, ~removable, ~taken)
    order = order[movable[order]]
    ends = np.arange(first, most + 1, multiple, dtype=np.int64)
    num_gone = int(taken.sum())
    if num_gone:
        ends = np.union1d(ends, num_gone)
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    return RemovalOrder(
        axis=axis,
        order=order,
        step_ends=ends,
        scores=_sums(scores[order], starts, ends),
        costs=_sums(costs[order], starts, ends),
        mean=float(scores.mean()),
        deviation=float(scores.std()),
        step=multiple,
        unit_cost=float(costs.max()),
        total_cost=float(costs.sum()),
        num_taken=int(np.searchsorted(ends, num_gone, side="right")),
    )


def _order(axis: Axis, *keys: npt.NDArray[Any]) -> Ints:
    """Units by the last of these keys, then the one before it; of an axis in blocks the first of each block first."""
    each = np.lexsort([key.reshape(axis.num_blocks, -1) for key in keys], axis=-1)
    starts = np.arange(axis.num_blocks)[:, None] * each.shape[1]
    order: Ints = (starts + each).T.reshape(-1)
    return order


def _sums(values: Floats, starts: Ints, ends: Ints) -> Floats:
    if not len(ends):
        return np.zeros(0)
    sums: Floats = np.add.reduceat(values[: ends[-1]], starts)  # each on its own: one huge score drowns no other
    return sums


def state_after(
    ladders: list[RemovalOrder], taken: list[int], structure: Structure, *, indices: bool = False
) -> AllocationState:
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
            if gone[name] <= layers:
                del kept[name]  # only those of removed layers are gone, which that says
        elif name in widths:
            widths[name] -= len(layers)
    return AllocationState(kept, widths, layers, branches)
