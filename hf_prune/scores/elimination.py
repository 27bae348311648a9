"""Remove units from least-squares problems one after the other, the cheapest first: the arithmetic of `obs`.

Of each problem there is one table `[K, D + K]`, Wᵀ beside H⁻¹, and it is changed in place. Units that go are taken out
of both by one product; then the last rows and columns move to where those were, so that products shrink with what is
left. H and H⁻¹ are symmetric: of as many block rows as `_BLOCKS`, only the blocks up to the diagonal are computed. With
K inputs and D outputs that is K³ operations for H⁻¹, K³/3 to take all units out of it, and D·K² for W.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prune.layers.statistics import ridges

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROUNDS = 128
"""Wide axes lose several units at a time, the cheapest ones, so that there are no more rounds than this."""
_BLOCKS = 8
_PIVOT = 128
"""So many inputs are inverted at a time: H⁻¹ is made of products."""


def removal_costs(
    grams: Iterable[Tensor],
    weights: Iterable[Tensor],
    units: Tensor,
    width: int,
    ridge: float,
    loss_weights: Sequence[float] = (1.0,),
    num_blocks: int = 1,
) -> Tensor:
    """Remove units until `width` are left.

    Args:
        grams: H `[K, K]` of the inputs of each expert (of one linear layer: just one); centred if it has a bias. Read
            one after the other.
        weights: `[D, K]` each.
        units: int64 `[K]`, the unit of each input, or -1 where it has none.
        width: units that stay, 0 or more.
        ridge: added to H, as a fraction of its mean diagonal; more of it if H is not positive definite.
        loss_weights: factor on the squared error of each.
        num_blocks: runs of units of which equally many stay; a divisor of `width` and of their number.

    Returns:
        float64 `[units]`: what the squared error of the repaired outputs grows by as the unit goes, at least as much as
        for those that went before; infinite for those that stay.
    """
    tables = [_Table(gram, weight.detach(), ridge) for gram, weight in zip(grams, weights, strict=True)]
    owner = units.to(tables[0].values.device, copy=True)  # the unit of each row
    left = int(owner.max()) + 1
    result, highest = tables[0].values.new_full((left,), math.inf), 0.0
    at_once = math.ceil((left - width) / ROUNDS)
    room = torch.full((num_blocks,), (left - width) // num_blocks, device=owner.device)  # of each block, to go
    while left > width:
        groups = _rows_of_units(owner, len(result))
        costs = torch.stack(
            [factor * table.costs(groups) for table, factor in zip(tables, loss_weights, strict=True)]
        ).sum(0)
        order = torch.cat([unit for unit, _ in groups])
        costs = torch.full_like(result, math.inf).index_copy_(0, order, costs)
        cheapest = costs.argsort(stable=True)
        blocks = cheapest * num_blocks // len(result)
        place = F.one_hot(blocks, num_blocks).cumsum(0).gather(1, blocks[:, None])[:, 0]  # in its block, from 1
        cheapest = cheapest[place <= room[blocks]][: min(at_once, left - width)]
        room -= torch.bincount(cheapest * num_blocks // len(result), minlength=num_blocks)
        result[cheapest] = costs[cheapest].cummax(0).values.clamp_min(highest)
        highest = float(result[cheapest[-1]])
        goes = torch.isin(owner, cheapest)
        size = int((~goes).sum())
        gone, last = torch.nonzero(goes)[:, 0], size + torch.nonzero(~goes[size:])[:, 0]
        holes = gone[: len(last)]  # the rows below `size` among those that go: as many as stay above
        for table in tables:
            table.remove(gone)
            table.move(last, holes, size)
        owner[holes] = owner[last]
        owner = owner[:size]
        left -= len(cheapest)
    return result


def _rows_of_units(owner: Tensor, num_units: int) -> list[tuple[Tensor, Tensor]]:
    """Units that are left `[u]` and their rows `[u, rows]`, for each number of rows that a unit has."""
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner + 1, minlength=num_units + 1)
    ends = counts.cumsum(0)
    counts[0] = 0  # inputs without a unit
    groups = []
    for size in torch.unique(counts[counts > 0]).tolist():
        found = torch.nonzero(counts == size)[:, 0]
        groups.append((found - 1, order[ends[found, None] - size + torch.arange(size, device=order.device)]))
    return groups


class _Table:
    """Wᵀ beside H⁻¹ of the inputs that are left."""

    def __init__(self, gram: Tensor, weight: Tensor, ridge: float) -> None:
        self.outputs, self.size = weight.shape
        self.step = -(-self.size // (_BLOCKS * _PIVOT)) * _PIVOT
        self.values = gram.new_empty(self.size, self.outputs + self.size)
        self.values[:, : self.outputs] = weight.T
        tried = ridges(gram, ridge)
        while True:
            _, penalty = next(tried)
            self.inverse.copy_(gram).diagonal().add_(penalty)
            if invert_(self.inverse, self.step):
                return

    @property
    def weight(self) -> Tensor:
        """Wᵀ `[size, D]`."""
        return self.values[: self.size, : self.outputs]

    @property
    def inverse(self) -> Tensor:
        """H⁻¹ `[size, size]`, of which the block rows hold what is up to the end of their diagonal block."""
        return self.values[: self.size, self.outputs : self.outputs + self.size]

    def costs(self, groups: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What the error grows by without each unit, in the order of the groups: `[units]`."""
        found = []
        for _, rows in groups:
            if rows.shape[1] == 1:
                squares = torch.linalg.vector_norm(self.weight, dim=1).square()
                found.append((squares / self.inverse.diagonal())[rows[:, 0]])
                continue
            one, other = rows[:, :, None], rows[:, None, :]
            blocks = self.inverse[torch.maximum(one, other), torch.minimum(one, other)]
            slices = self.weight[rows]
            found.append((torch.linalg.inv(blocks) * (slices @ slices.mT)).sum((1, 2)))
        return torch.cat(found)

    def remove(self, gone: Tensor) -> None:
        """Take rows out of the others."""
        rows = self._rows(gone)
        step = torch.linalg.inv(rows[:, self.outputs + gone]) @ rows[:, self.outputs :]
        for start in range(0, self.size, self.step):
            stop = min(start + self.step, self.size)
            width = self.outputs + stop
            self.values[start:stop, :width].addmm_(step[:, start:stop].T, rows[:, :width], alpha=-1)

    def move(self, last: Tensor, holes: Tensor, size: int) -> None:
        """Put the rows and columns `last` in place of `holes`, and keep the first `size`."""
        rows = self._rows(last)
        rows[:, self.outputs + holes] = rows[:, self.outputs + last]
        self.size = size
        rows = rows[:, : self.outputs + size]
        self.values[holes, : rows.shape[1]] = rows
        self.inverse.index_copy_(1, holes, rows[:, self.outputs :].T)

    def _rows(self, which: Tensor) -> Tensor:
        """Whole rows: `[rows, D + size]`."""
        rows = self.values[which, : self.outputs + self.size]
        if self.size > self.step:
            known = (which // self.step + 1) * self.step
            mirrored = self.values[: self.size].index_select(1, self.outputs + which).T  # fast where rows are whole
            inside = torch.arange(self.size, device=which.device) < known[:, None]
            rows[:, self.outputs :] = torch.where(inside, rows[:, self.outputs :], mirrored)
        return rows


def invert_(matrix: Tensor, step: int) -> bool:
    """Inverse of a symmetric matrix, in place; `False`, and a spoilt matrix, if it is not positive definite.

    Gauss-Jordan by blocks, without pivoting, which such a matrix does not need.

    Args:
        matrix: `[K, K]`; of each block row only the blocks up to the diagonal are read and written.
        step: rows of a block row, a multiple of `_PIVOT`.
    """
    size = len(matrix)
    for start in range(0, size, _PIVOT):
        stop = min(start + _PIVOT, size)
        above, below = start // step * step, min(start // step * step + step, size)  # its block row
        rows = torch.cat([matrix[start:stop, :below], matrix[below:, start:stop].T], 1)
        factor, failed = torch.linalg.cholesky_ex(rows[:, start:stop])
        if int(failed):
            return False
        pivot = torch.cholesky_inverse(factor)
        solved = pivot @ rows
        for first in range(0, size, step):
            end = min(first + step, size)
            matrix[first:end, :end].addmm_(rows[:, first:end].T, solved[:, :end], alpha=-1)
        solved[:, start:stop] = -pivot
        matrix[start:stop, :below] = solved[:, :below]
        matrix[above:, start:stop] = solved[:, above:].T
    matrix.neg_()
    return True
