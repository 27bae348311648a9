"""The algebra of layouts: how one dimension of a tensor is laid out over axes.

A layout is a tree. `Units("layers.3.mlp", 11008)` is a whole axis, `Fixed(64)` a run of entries that nobody prunes,
`Product` is row-major (`H × E`), `Concat` puts parts one after another (`[I + I]`). Three operations are all that the
rest of the package needs: `size`, `indices` and `unit_ids`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Widths = Mapping[str, int]
KeptIndices = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Fixed:
    """A run of `length` entries that is on no axis."""

    length: int

    def __str__(self) -> str:
        return str(self.length)


@dataclass(frozen=True)
class Units:
    """One whole axis with `num_units` units, one entry each; of an axis in blocks, the units of one block.

    Which block that is says the axis `block`, an earlier factor of the same product: query heads inside of a KV group.
    Or it is the place in the first dimension of the tensor: channels inside of experts. There `axis` has a unit for the
    same channel of all experts, and `own` one for each channel of each. Units of an axis in blocks are numbered through
    all blocks, of which each keeps equally many.
    """

    axis: str
    num_units: int
    block: str = ""
    num_blocks: int = 1
    own: str = ""

    def __str__(self) -> str:
        return self.axis


@dataclass(frozen=True)
class Product:
    """Row-major product of `factors`: the last factor varies fastest."""

    factors: tuple[Layout, ...]

    def __str__(self) -> str:
        return "(" + " × ".join(map(str, self.factors)) + ")"


@dataclass(frozen=True)
class Concat:
    """Concatenation of `parts`."""

    parts: tuple[Layout, ...]

    def __str__(self) -> str:
        return "[" + " + ".join(map(str, self.parts)) + "]"


Layout = Fixed | Units | Product | Concat


def units(layout: Layout) -> Iterator[Units]:
    """Yield the axes of `layout`, in order, with repetition."""
    if isinstance(layout, Units):
        yield layout
    elif isinstance(layout, Product):
        for factor in layout.factors:
            yield from units(factor)
    elif isinstance(layout, Concat):
        for part in layout.parts:
            yield from units(part)


def axes(layout: Layout) -> Iterator[str]:
    """Yield the axis names of `layout`, in order, with repetition."""
    return (name for found in units(layout) for name in (found.axis, found.own) if name)


def size(layout: Layout, widths: Widths) -> int:
    """Length of the dimension when each axis has its width in `widths` (an axis not named keeps all units)."""
    if isinstance(layout, Fixed):
        return layout.length
    if isinstance(layout, Units):
        total = layout.num_units * layout.num_blocks
        own = widths.get(layout.own or layout.axis, total) // layout.num_blocks
        return min(own, widths.get(layout.axis, layout.num_units)) if layout.own else own
    if isinstance(layout, Product):
        return math.prod(size(factor, widths) for factor in layout.factors)
    return sum(size(part, widths) for part in layout.parts)


def indices(layout: Layout, kept: KeptIndices) -> Tensor:
    """Positions of the dimension that stay when only the units in `kept` stay.

    Args:
        layout: layout of the dimension.
        kept: sorted unit indices per axis, of an axis in blocks equally many of each; one not named keeps all units.

    Returns:
        int64 `[size(layout, widths)]`, ascending if the unit indices are.
    """
    found = _indices(layout, kept)
    for axis in {node.axis for node in units(layout) if node.block and node.axis in kept}:
        ids = unit_ids(layout, axis)[found]
        found = found[(ids < 0) | torch.isin(ids, torch.as_tensor(list(kept[axis])))]
    return found


def kept_positions(layouts: Sequence[Layout], dim: int, kept: KeptIndices) -> Tensor:
    """`indices` of one dimension of a tensor.

    Returns:
        int64 `[n]`; `[blocks, n]` where the blocks that stay in the first dimension keep units of their own.
    """
    layout = layouts[dim]
    for node in units(layout):
        if node.own in kept:
            table = torch.as_tensor(kept[node.own]).view(node.num_blocks, -1) % node.num_units
            rows = table[indices(layouts[0], kept)].tolist()
            return torch.stack([indices(layout, {node.axis: row}) for row in rows])
    return indices(layout, kept)


def _indices(layout: Layout, kept: KeptIndices) -> Tensor:
    """`indices` with the units of all blocks."""
    if isinstance(layout, Fixed):
        return torch.arange(layout.length)
    if isinstance(layout, Units):
        if layout.axis in kept and not layout.block:
            return torch.as_tensor(list(kept[layout.axis]), dtype=torch.int64)
        return torch.arange(layout.num_units)
    if isinstance(layout, Product):
        result = torch.zeros(1, dtype=torch.int64)
        for factor in layout.factors:
            result = (result[:, None] * size(factor, {}) + _indices(factor, kept)[None, :]).reshape(-1)
        return result
    offset, found = 0, []
    for part in layout.parts:
        found.append(_indices(part, kept) + offset)
        offset += size(part, {})
    return torch.cat(found)


def unit_ids(layout: Layout, axis: str) -> Tensor:
    """For each position of the dimension the unit of `axis` it carries, or -1 where it carries none.

    Returns:
        int64 `[size]`; `[blocks, size]` where the places in the first dimension of the tensor are the axis's blocks.
    """
    ids = _unit_ids(layout, axis)
    for node in units(layout):
        blocks = None
        if node.own == axis:
            blocks = torch.arange(node.num_blocks)[:, None]
        elif node.axis == axis and node.block:
            blocks = _unit_ids(layout, node.block)
        if blocks is not None:
            return torch.where(ids >= 0, blocks * node.num_units + ids, -1)
    return ids


def _unit_ids(layout: Layout, axis: str) -> Tensor:
    """`unit_ids`, those of an axis in blocks within their block."""
    if isinstance(layout, Units) and axis in (layout.axis, layout.own):
        return torch.arange(layout.num_units)
    if isinstance(layout, (Fixed, Units)):
        return torch.full((size(layout, {}),), -1)
    if isinstance(layout, Product):
        result = torch.full((1,), -1)
        for factor in layout.factors:
            ids = _unit_ids(factor, axis)
            result = torch.where(ids[None, :] >= 0, ids[None, :], result[:, None]).reshape(-1)
        return result
    return torch.cat([_unit_ids(part, axis) for part in layout.parts])


def reduce(values: Tensor, layouts: Sequence[Layout], axis: str) -> Tensor:
    """Sum a weight-shaped tensor over everything but one axis.

    Args:
        values: tensor with one layout per dimension.
        layouts: the layouts of its dimensions.
        axis: the axis that stays. If several dimensions carry it, their sums are added.

    Returns:
        float32 (float64 for float64 `values`) `[num_units]`, summed in that dtype.
    """
    values = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    total: Tensor | None = None
    for dim, layout in enumerate(layouts):
        if axis not in axes(layout):
            continue
        ids = unit_ids(layout, axis).to(values.device)
        line = along(values, dim, ids)
        on_axis = ids >= 0
        num_units = int(ids.max()) + 1
        part = line.new_zeros(num_units).index_add_(0, ids[on_axis], line[on_axis])
        total = part if total is None else total + part
    if total is None:
        raise KeyError(f"no dimension carries axis {axis!r}")
    return total


def along(values: Tensor, dim: int, ids: Tensor) -> Tensor:
    """Sum a tensor over all dimensions that `unit_ids` of dimension `dim` does not tell apart: the shape of `ids`."""
    others = [d for d in range(values.dim()) if d != dim and (d > 0 or ids.dim() == 1)]
    return values.sum(dim=others) if others else values


def reduce_dim(values: Tensor, layout: Layout, dim: int, axis: str) -> Tensor:
    """`reduce`, looking only at dimension `dim` of `values`, which is laid out as `layout`."""
    return reduce(values, [layout if d == dim else Fixed(n) for d, n in enumerate(values.shape)], axis)
