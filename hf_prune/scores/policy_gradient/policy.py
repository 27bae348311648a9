"""The policy: one keep-probability per unit of all axes in a row, what units cost, and where learning starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_prune.config import PolicyGradientConfig, removable, selected_axes
from hf_prune.errors import BudgetError
from hf_prune.scores.policy_gradient.projection import project
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hf_prune.structure.axes import Axis, Structure

BRANCHES = ("attention", "mlp", None)
SCORE_SOFTNESS = 0.25
"""Band of the keep-probabilities that are returned for learned widths: wide, so that every rank is told apart."""


@dataclass(frozen=True)
class UnitSpace:
    """All units of the selected axes, N of them in a row, A axes, on one device; and the budget they share."""

    axes: tuple[Axis, ...]
    axis_ids: Tensor
    """Axis of each unit, int64 `[N]`."""
    sizes: Tensor
    """Units of each axis, float32 `[A]`."""
    costs: Tensor
    """What each unit counts in the budget where everything else stays, float32 `[N]`: parameters, or 1."""
    parameters: Tensor
    """Parameters that go with each unit of the dense model, float32 `[N]`: what `global` allocation divides by."""
    frozen: Tensor
    """Layers and branches that may not go, bool `[N]`."""
    blocks: Tensor
    """For each unit the (layer, branch) that it vanishes with, -1 for units of layer axes, int64 `[N]`."""
    branch_overhead: Tensor
    """What a (layer, branch) counts beside its units, float32 `[3 · layers]`."""
    layer_units: tuple[tuple[int, str], ...]
    """Where units of layer axes begin: (first unit, name of the axis)."""
    total: float
    """What the dense model counts."""
    target: float
    """What is to be kept of it."""
    groups: tuple[Tensor, ...] = ()
    """Units with a budget of their own, bool `[N]` each; empty: all share one."""

    def kept(self, keep_probs: Tensor) -> Tensor:
        """What is kept in expectation: `[..., N]` → `[...]`. A unit inside of a layer needs the layer too."""
        if not self.layer_units:
            return self.total - (1 - keep_probs) @ self.costs
        alive = keep_probs.new_ones(*keep_probs.shape[:-1], len(self.branch_overhead))
        own = keep_probs.new_zeros(keep_probs.shape[:-1])
        num_layers = len(self.branch_overhead) // len(BRANCHES)
        for start, name in self.layer_units:
            layers = keep_probs[..., start : start + num_layers]
            branch = name.partition(".")[2]
            columns = [BRANCHES.index(branch)] if branch else range(len(BRANCHES))  # type: ignore[arg-type]
            for column in columns:
                alive[..., column :: len(BRANCHES)] *= layers
            own = own + layers @ self.costs[start : start + num_layers]
        # units of layer axes have no block and are counted above; -1 would index the last one
        units = torch.where(self.blocks >= 0, keep_probs * self.costs * alive[..., self.blocks.clamp_min(0)], 0)
        everything = self.branch_overhead.sum() + self.costs.sum()
        return self.total - everything + own + units.sum(-1) + alive @ self.branch_overhead

    def project(self, keep_probs: Tensor, shift: Tensor, clamp: float) -> Tensor:
        """Onto the budget (or each group onto its own), in [clamp, 1 − clamp]; what must stay is 1."""
        low, high = self.bounds(clamp)
        if not self.groups:
            return project(keep_probs, self.kept, self.target, shift, low, high)
        projected = keep_probs
        share = (self.total - self.target) / self.costs.sum()
        for group in self.groups:
            costs = torch.where(group, self.costs, 0)
            moved = project(keep_probs, lambda s, c=costs: s @ c, (1 - share) * costs.sum(), shift, low, high)  # type: ignore[misc]
            projected = torch.where(group, moved, projected)
        return projected

    def bounds(self, clamp: float) -> tuple[Tensor, Tensor]:
        """Lowest and highest keep-probabilities `[N]`."""
        one = torch.ones_like(self.costs)
        return torch.where(self.frozen, one, clamp), torch.where(self.frozen, one, 1 - clamp)

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """`[..., N]` → axis → `[..., num_units]`."""
        parts = torch.split_with_sizes(values, [axis.num_units for axis in self.axes], -1)
        return {axis.name: part for axis, part in zip(self.axes, parts, strict=True)}

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Axis → `[num_units]`, to float32 `[N]` on the device of the policy."""
        return torch.cat([values[axis.name].float() for axis in self.axes]).to(self.costs.device)

    def ranks(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Rank of each unit in its axis, 0 for the highest score (ties: higher index first), float32 `[N]`."""
        stay = self.split(self.frozen)
        found = {}
        for name, values in scores.items():
            order = torch.where(stay[name].cpu(), torch.inf, values.double().cpu()).argsort(stable=True).flip(0)
            found[name] = torch.empty(len(order)).index_copy_(0, order, torch.arange(len(order)).float())
        return self.join(found)


def find_units(structure: Structure, config: PolicyGradientConfig, device: torch.device) -> UnitSpace:
    """The units that `config` lets go, and their budget.

    Raises:
        BudgetError: the ratio is out of reach.
    """
    axes = tuple(selected_axes(structure, config))
    budget = "decoder" if config.budget == "decoder" else "model"
    counted = structure.counted(budget)  # type: ignore[arg-type]
    num_layers = len(structure.layer_paths)
    parameters, blocks, stay = [], [], []
    branch_overhead = torch.zeros(num_layers * len(BRANCHES))
    for name in counted:
        if name in structure.owners:
            owner = structure.owners[name]
            branch_overhead[owner.layer * len(BRANCHES) + BRANCHES.index(owner.branch)] += structure.numel(name)
    whole = branch_overhead.clone()
    layer_units, start = [], 0
    for axis in axes:
        frozen = torch.zeros(axis.num_units, dtype=torch.bool)
        if axis.kind == "layer":
            layer_units.append((start, axis.name))
            branch = axis.name.partition(".")[2]
            owned = whole.view(num_layers, -1)
            parameters.append(owned[:, BRANCHES.index(branch)] if branch else owned.sum(1))  # type: ignore[arg-type]
            blocks.append(torch.full((num_layers,), -1))
            frozen[[i for i in range(num_layers) if not removable(structure, config, axis.name, i)]] = True
        else:
            cost = _parameters_of_unit(structure, axis, counted)
            block = -1 if axis.layer is None else axis.layer * len(BRANCHES) + BRANCHES.index(axis.branch)
            branch_overhead[block] -= cost * axis.num_units
            parameters.append(torch.full((axis.num_units,), float(cost)))
            blocks.append(torch.full((axis.num_units,), block))
        stay.append(frozen)
        start += axis.num_units
    if config.budget == "units":
        costs = [torch.ones(axis.num_units) for axis in axes]
        total, branch_overhead = float(start), torch.zeros_like(branch_overhead)
    else:
        # a layer counts through what is inside of it
        costs = [torch.zeros(a.num_units) if a.kind == "layer" else p for a, p in zip(axes, parameters, strict=True)]
        total = float(structure.num_parameters(budget=budget))  # type: ignore[arg-type]
    units = UnitSpace(
        axes=axes,
        axis_ids=torch.cat([torch.full((a.num_units,), i) for i, a in enumerate(axes)]).to(device),
        sizes=torch.tensor([float(axis.num_units) for axis in axes], device=device),
        costs=torch.cat(costs).to(device),
        parameters=torch.cat(parameters).to(device),
        frozen=torch.cat(stay).to(device),
        blocks=torch.cat(blocks).to(device),
        branch_overhead=branch_overhead.to(device),
        layer_units=tuple(layer_units),
        total=total,
        target=(1 - config.pruning_ratio) * total,
        groups=_groups(axes, device) if config.separate_budgets else (),
    )
    _check_budget(units, config)
    return units


def initial_widths(units: UnitSpace, scores: Mapping[str, Tensor], config: PolicyGradientConfig) -> Tensor:
    """Fraction of each axis that is kept at first, float32 `[A]`: the same, or by global ranking of scores."""
    everywhere = torch.full_like(units.sizes, 1 - config.pruning_ratio)
    if config.init_widths == "uniform":
        return project_widths(units, everywhere, lowest_widths(units, config), units.ranks(scores))
    best = (units.join(scores) / units.parameters.clamp_min(1)).argsort(descending=True, stable=True)
    removed = units.parameters.double()[best].flip(0).cumsum(0).flip(0)  # if this unit and all after it went
    chosen = torch.zeros_like(units.costs).index_copy_(0, best, (removed > units.total - units.target).float())
    widths = torch.stack([part.mean() for part in units.split(chosen).values()])
    return project_widths(units, widths, lowest_widths(units, config), units.ranks(scores))


def lowest_widths(units: UnitSpace, config: PolicyGradientConfig) -> Tensor:
    """Fraction of each axis that has to stay `[A]`: `min_units`, what it needs, or the layers that may not go."""
    stay = torch.stack([part.sum() for part in units.split(units.frozen).values()])
    least = [max(config.min_units, axis.least) * axis.num_blocks for axis in units.axes]
    return torch.maximum(stay, torch.tensor(least, device=stay.device)).float() / units.sizes


def project_widths(units: UnitSpace, widths: Tensor, low: Tensor, ranks: Tensor) -> Tensor:
    """Widths `[..., A]` shifted by the same fraction of every axis until they meet the budget.

    `ranks` `[N]` say which layers go first, where layers are units too.
    """
    shift = torch.ones_like(units.sizes)
    if not units.layer_units:
        costs = torch.zeros_like(units.sizes).index_add_(0, units.axis_ids, units.costs)
        projected, share = widths, (units.total - units.target) / costs.sum()
        none = torch.zeros_like(units.sizes)
        groups = [none.index_add(0, units.axis_ids, group.to(none)) > 0 for group in units.groups]
        for group in groups or [none == 0]:
            own = torch.where(group, costs, 0)
            moved = project(widths, lambda w, c=own: w @ c, (1 - share) * own.sum(), shift, low, 1.0)  # type: ignore[misc]
            projected = torch.where(group, moved, projected)
        return projected
    return project(widths, lambda w: units.kept(fill(units, w, ranks)), units.target, shift, low, 1.0)


def fill(units: UnitSpace, widths: Tensor, ranks: Tensor, fraction: Tensor | float = 0.0) -> Tensor:
    """How much of each unit lies within the widths: `[..., A]` → `[..., N]` in [0, 1].

    With `fraction` uniform in [0, 1) on each axis, `fill(...) > 0` keeps as many units as the widths say on average.
    """
    reached = (widths * units.sizes)[..., units.axis_ids] - ranks
    return (reached - fraction).clamp(0, 1)


def soft_profile(units: UnitSpace, widths: Tensor, ranks: Tensor, softness: float) -> Tensor:
    """Keep-probabilities `[N]` that fall with the rank, ½ where the width ends, over a band of `softness` · n units."""
    sizes = units.sizes[units.axis_ids]
    distance = widths[units.axis_ids] * sizes - ranks - 0.5
    return torch.sigmoid(distance / (softness * sizes).clamp_min(0.25))


def paper_profile(units: UnitSpace, widths: Tensor, scores: Mapping[str, Tensor], clamp: float) -> Tensor:
    """The paper's map of scores to probabilities: per axis z-score → sigmoid → shift → clip, so that the mean is w."""
    found = {}
    low, high = (units.split(bound) for bound in units.bounds(clamp))
    for width, (name, values) in zip(widths, units.split(units.join(scores)).items(), strict=True):
        z = torch.sigmoid((values - values.mean()) / values.std(correction=0).clamp_min(1e-12))
        one = torch.ones_like(z)
        found[name] = project(z, lambda s: s.mean(-1), width, one, low[name], high[name])
    return units.join(found)


def as_scores(units: UnitSpace, keep_probs: Tensor) -> dict[str, Tensor]:
    """Scores whose global ranking by parameters is the ranking by keep-probability: s · parameters.

    With separate budgets, s first becomes the share of its group's cost that has lower probabilities, so that one
    threshold takes the same fraction of every group.
    """
    values = keep_probs
    for group in units.groups:
        order = torch.where(group, keep_probs, torch.inf).argsort(stable=True)
        costs = torch.where(group, units.costs, 0)[order].double().cumsum(0)
        quantiles = torch.empty_like(keep_probs).index_copy_(0, order, (costs / costs[-1]).to(keep_probs))
        values = torch.where(group, quantiles, values)
    relative = units.parameters / units.parameters.clamp_min(1).min()
    return {name: part.float().cpu() for name, part in units.split(values * relative).items()}


def _parameters_of_unit(structure: Structure, axis: Axis, counted: list[str]) -> float:
    less = {axis.name: axis.num_units - axis.num_blocks}
    carriers = [n for n in counted if any(axis.name in lay.axes(layout) for layout in structure.layouts[n])]
    return sum(structure.numel(name) - structure.numel(name, less) for name in carriers) / axis.num_blocks


def _groups(axes: tuple[Axis, ...], device: torch.device) -> tuple[Tensor, ...]:
    kinds = dict.fromkeys(axis.kind for axis in axes)
    return tuple(torch.cat([torch.full((a.num_units,), a.kind == kind) for a in axes]).to(device) for kind in kinds)


def _check_budget(units: UnitSpace, config: PolicyGradientConfig) -> None:
    floors = fill(
        units,
        lowest_widths(units, config),
        torch.cat([torch.arange(axis.num_units) for axis in units.axes]).to(units.costs),
    )
    least = float(units.kept(torch.where(units.frozen, 1, floors)))
    if least > units.target:
        most = 1 - least / units.total
        raise BudgetError(
            f"pruning_ratio={config.pruning_ratio} of {config.budget} is out of reach: axes={config.axes}, "
            f"min_units={config.min_units}, layers={config.layers} and protect={config.protect} let go at most "
            f"{most:.4f}. Ask for less, for more axes, or relax these limits."
        )
