"""Optimal brain surgeon by structures: in which order units go, and what the repaired error grows by with each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_prune.layers.statistics import factorised

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUNDS = 128
"""Wide axes lose several units at a time, the cheapest ones, so that there are no more rounds than this."""


def removal_costs(
    grams: Sequence[Tensor],
    weights: Sequence[Tensor],
    units: Tensor,
    width: int,
    ridge: float,
    worth: Sequence[float] = (1.0,),
) -> Tensor:
    """Remove units until `width` are left.

    Args:
        grams: H `[K, K]` of the inputs of each expert (of one linear layer: just one); centred if it has a bias.
        weights: `[D, K]` each.
        units: int64 `[K]`, the unit of each input, or -1 where it has none.
        width: units that stay, 0 or more.
        ridge: added to H, as a fraction of its mean diagonal.
        worth: factor on the squared error of each.

    Returns:
        float64 `[units]`: what the squared error of the repaired outputs grows by as the unit goes, at least as much as
        for those that went before; infinite for those that stay.
    """
    parts = []
    for gram, weight, factor in zip(grams, weights, worth, strict=True):
        cholesky, *_ = factorised(gram, ridge)
        parts.append((torch.cholesky_inverse(cholesky), weight.detach().to(gram, copy=True), factor))
    units = units.to(grams[0].device)
    alive = sorted({int(unit) for unit in units if unit >= 0})
    entries = {unit: torch.nonzero(units == unit)[:, 0] for unit in alive}
    result, highest = grams[0].new_full((len(alive),), math.inf), 0.0
    at_once = math.ceil((len(alive) - width) / ROUNDS)
    while len(alive) > width:
        places = [entries[unit] for unit in alive]
        costs = torch.stack([factor * _costs(inverse, weight, places) for inverse, weight, factor in parts]).sum(0)
        cheapest = costs.argsort(stable=True)[: min(at_once, len(alive) - width)].tolist()
        gone = torch.cat([places[index] for index in cheapest])
        for index in cheapest:
            highest = max(highest, float(costs[index]))
            result[alive[index]] = highest
        for inverse, weight, _ in parts:
            update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
            weight -= weight[:, gone] @ update
            inverse -= inverse[:, gone] @ update
        alive = [unit for index, unit in enumerate(alive) if index not in set(cheapest)]
    return result


def _costs(inverse: Tensor, weight: Tensor, entries: list[Tensor]) -> Tensor:
    """What the repaired error grows by without each unit: float64 `[units]`."""
    if all(len(found) == 1 for found in entries):
        places = torch.cat(entries)
        return weight[:, places].square().sum(0) / inverse.diagonal()[places]
    blocks = torch.stack([inverse[found][:, found] for found in entries])
    slices = torch.stack([weight[:, found].T for found in entries])
    costs: Tensor = (slices * torch.linalg.solve(blocks, slices)).sum((1, 2))
    return costs
