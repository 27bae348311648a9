"""Sequences: in which order the steps of all axes are taken, and where the sequence may be cut to meet a budget.

A sequence depends on scores and limits but not on the ratio, and a plan is a prefix of it. So for fixed scores kept
sets are nested as the ratio grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, get_args

import numpy as np

from hf_prune.allocation.budgets import BudgetMeter, ratio_too_small, ratio_unreachable
from hf_prune.config import AxisKind, PruningConfig, axes_of_kind
from hf_prune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hf_prune.allocation.ladders import Floats, Ints, RemovalOrder
    from hf_prune.structure.axes import Structure

SPLIT_ABOVE = 0.01
"""Uniform allocation takes a step in all layers at once unless that removes more than this fraction of the budget."""


@dataclass(frozen=True)
class Share:
    """What one axis loses, relative to the others."""

    weight: float
    """Weight of the fraction removed, 0 or more; 0: the axis stays whole."""
    pool: str | None = None
    """Axes of the same pool lose this fraction together: their units compete by score."""


def by_score(ladders: list[RemovalOrder], standardise: str) -> tuple[Ints, Ints]:
    """Sequence by score per cost, lower first, and where it may be cut: anywhere."""
    order = np.argsort(np.concatenate(step_values(ladders, standardise)), kind="stable")
    return order, np.arange(1, len(order) + 1)


def step_values(ladders: list[RemovalOrder], standardise: str) -> list[Floats]:
    """What each step is worth where axes compete, never falling along a ladder; taken steps come before all others.

    `none`: score per cost; `sum`: share of the axis's total score, per cost. `mean` and `zscore` compare units with
    the others of their axis, whatever they cost: the cost then matters to the budget only.
    """
    values = []
    for ladder in ladders:
        num_units = np.diff(ladder.step_ends, prepend=0)
        if standardise == "zscore":
            value = (ladder.scores / num_units - ladder.mean) / (ladder.deviation or 1.0)
        elif standardise == "mean":
            value = ladder.scores / num_units / (abs(ladder.mean) or 1.0)
        else:
            total = abs(ladder.mean) * ladder.axis.num_units if standardise == "sum" else 1.0
            value = ladder.scores / (total or 1.0) / np.maximum(ladder.costs, 1)
        num_taken = ladder.num_taken
        values.append(np.append(np.full(num_taken, -np.inf), np.maximum.accumulate(value[num_taken:])))
    return values


def by_fraction(
    ladders: list[RemovalOrder], shares: Sequence[Share], spending: BudgetMeter, config: PruningConfig
) -> tuple[Ints, Ints]:
    """Sequence by fraction removed over weight, and where it may be cut.

    Equal steps of axes of one kind, size and weight are taken at once, unless they are dear; then by score.
    """
    labels: dict[tuple[str, int], int] = {}
    groups, positions = [], []
    pools = _pool_positions(ladders, shares, config)
    for i, (ladder, share) in enumerate(zip(ladders, shares, strict=True)):
        kind = ladder.axis.kind if ladder.axis.layer is not None else ladder.axis.name
        label = (kind, ladder.axis.num_units) if share.pool is None else (f"pool {share.pool}", 0)
        groups.append(labels.setdefault(label, len(labels)))
        same = [other.weight for x, other in zip(ladders, shares, strict=True) if x.tie and x.tie == ladder.tie]
        weight = float(np.mean(same)) if same else share.weight
        # A step is due once the fraction covers it whole: of 4 KV groups none goes at 20 %, finer axes make up for it.
        fraction = pools[i] if share.pool is not None else ladder.step_ends / ladder.axis.num_units
        positions.append(fraction / weight if weight else fraction)
    group = np.repeat(groups, [len(ladder.step_ends) for ladder in ladders])
    position = np.concatenate(positions)
    score = np.concatenate([ladder.scores for ladder in ladders])
    cost = np.concatenate([ladder.costs for ladder in ladders])
    order = np.lexsort((score, group, position))  # stable, so ties keep the order of the axes
    position, group, cost = position[order], group[order], cost[order]
    last = np.append((np.diff(position) != 0) | (np.diff(group) != 0), True)
    first = np.flatnonzero(np.append(True, last[:-1]))
    group_cost = np.add.reduceat(cost, first)
    dear = np.repeat(group_cost > SPLIT_ABOVE * spending.base, np.diff(np.append(first, len(order))))
    return order, np.flatnonzero(last | dear) + 1


def _pool_positions(ladders: list[RemovalOrder], shares: Sequence[Share], config: PruningConfig) -> dict[int, Floats]:
    """For each ladder in a pool: which fraction of the pool (of its units, or of its cost) is gone after each step."""
    found: dict[int, Floats] = {}
    for pool in dict.fromkeys(share.pool for share in shares if share.pool is not None):
        members = [i for i, share in enumerate(shares) if share.pool == pool]
        inside = [ladders[i] for i in members]
        by_units = config.budget == "units"
        sizes = [np.diff(x.step_ends, prepend=0).astype(np.float64) if by_units else x.costs for x in inside]
        total = sum(ladder.axis.num_units if by_units else ladder.total_cost for ladder in inside)
        order = np.argsort(np.concatenate(step_values(inside, config.standardise)), kind="stable")
        position = np.empty(len(order))
        position[order] = np.cumsum(np.concatenate(sizes)[order]) / max(total, np.finfo(np.float64).tiny)
        found.update(zip(members, np.split(position, np.cumsum([len(x.step_ends) for x in inside])[:-1]), strict=True))
    return found


def shares_of_mapping(ladders: list[RemovalOrder], structure: Structure, config: PruningConfig) -> list[Share]:
    """What each axis loses under an explicit mapping; axes that no entry names stay whole.

    The first entry that fits counts. A kind of axes (`mlp`, `attention`, ...) is one pool; a pattern gives its weight
    to each axis that it matches.

    Raises:
        ConfigError: an entry fits no axis that may lose units.
    """
    assert isinstance(config.allocation, tuple)
    kinds: dict[str, set[str]] = {
        kind: {axis.name for axis in axes_of_kind(structure, kind)} for kind in get_args(AxisKind)
    }

    def fits(pattern: str, name: str) -> bool:
        return name in kinds[pattern] if pattern in kinds else fnmatchcase(name, pattern)

    shares = []
    for ladder in ladders:
        share = Share(0.0)
        for pattern, weight in config.allocation:
            if fits(pattern, ladder.axis.name):
                share = Share(weight, pattern if pattern in kinds else None)
                break
        shares.append(share)
    for pattern, _ in config.allocation:
        if not any(fits(pattern, ladder.axis.name) for ladder in ladders):
            names = ", ".join([ladder.axis.name for ladder in ladders][:8])
            raise ConfigError(f"allocation: {pattern!r} fits none of the axes that may lose units: {names}, ...")
    tied = {(ladder.tie, share) for ladder, share in zip(ladders, shares, strict=True) if ladder.tie}
    if len(tied) > len({tie for tie, _ in tied}):
        raise ConfigError(f"{config.target.text}; but the allocation tells layers apart: weigh whole kinds of axes.")
    return shares


def nearest_prefix(
    ladders: list[RemovalOrder], sequence: tuple[Ints, Ints], spending: BudgetMeter, config: PruningConfig
) -> list[int]:
    """Steps that each ladder takes in the prefix nearest to the asked ratio, those included that are taken already.

    Raises:
        BudgetError: the ratio is out of reach, or so small that no unit would be removed.
    """
    order, cuts = sequence
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    ranks = np.split(rank, np.cumsum([len(ladder.step_ends) for ladder in ladders])[:-1])
    already = [ladder.num_taken for ladder in ladders]
    for tie in {ladder.tie for ladder in ladders} - {""}:  # cut only where tied ladders are equally far
        own = [np.searchsorted(r, cuts) for r, ladder in zip(ranks, ladders, strict=True) if ladder.tie == tie]
        cuts = cuts[(np.stack(own) == own[0]).all(0)]

    def taken(cut: int) -> list[int]:
        if cut < 0:
            return already
        return [max(int(np.searchsorted(own, cuts[cut])), least) for own, least in zip(ranks, already, strict=True)]

    def removed(cut: int) -> float:
        return spending.removed(taken(cut))

    check_reach(ladders, spending, config)
    target = config.pruning_ratio * spending.base
    at_least = config.budget == "memory"  # a little too large does not fit
    best = _nearest(removed, len(cuts), target, at_least)
    if best < 0 and not any(already):
        raise ratio_too_small(config, f"the smallest step removes {removed(0) / spending.base:.4f} of {config.budget}")
    return taken(best)


def check_reach(ladders: list[RemovalOrder], spending: BudgetMeter, config: PruningConfig) -> None:
    """Raise `BudgetError` if all steps together do not reach the asked ratio, whatever the scores."""
    most = spending.removed([len(ladder.step_ends) for ladder in ladders])
    margin = 0.5 if config.budget == "memory" else spending.one_step_each / 2
    if config.pruning_ratio * spending.base - most > margin:
        raise ratio_unreachable(config, f"at most {most / spending.base:.4f} of {config.budget}")


def _nearest(removed: Callable[[int], float], num_cuts: int, target: float, at_least: bool) -> int:
    """The cut nearest to `target`, the earlier one of two (`at_least`: the first to reach it); -1: nothing more."""
    low, high = -1, num_cuts - 1  # removed(low) < target; the first cut that reaches it is in (low, high]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if removed(middle) >= target else (middle, high)
    return high if at_least or abs(removed(high) - target) < abs(removed(low) - target) else low


def units_of_axis(ladder: RemovalOrder, config: PruningConfig) -> int:
    """Steps that bring one axis nearest to `n - round(n · (1 - ratio))` removed units, the papers' meaning."""
    total = ladder.axis.num_units
    target = total - round(total * (1 - config.pruning_ratio))
    reached = np.append(0, ladder.step_ends)
    steps = max(int(np.abs(reached - target).argmin()), ladder.num_taken)
    if target - reached[steps] > ladder.step:
        raise ratio_unreachable(config, f"{int(reached[-1])} of {total} units of {ladder.axis.name}")
    return steps
