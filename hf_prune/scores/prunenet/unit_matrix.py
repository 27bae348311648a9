"""The matrix of a layer whose rows are the units of an axis, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_prune.errors import StructureError
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from hf_prune.structure.axes import Axis, Member, Structure

Read = Callable[[str], Tensor]
"""Gives the parameter of a name, from a model or from a file."""


@dataclass(frozen=True)
class UnitMatrix:
    """What one axis looks like to the policy. All float32."""

    state: Tensor
    """`[U, b, d]`: unit u carries b rows."""
    producer_norms: Tensor
    """`[U]`, product over the producers of the norms of each unit's slices."""
    consumer_norms: Tensor
    """`[U]`."""


def unit_matrix(read: Read, structure: Structure, axis: Axis, state: str) -> UnitMatrix:
    """Read the matrices of `axis` and put them together as `state` says (see `PruneNetConfig.state`).

    An MLP channel is one row of each matrix, an attention unit as many as its heads have. Biases are left out.

    Raises:
        StructureError: nothing produces, or nothing consumes, the axis.
        ScoreError: a weight is not finite.
    """
    weights: dict[str, list[Tensor]] = {"producer": [], "consumer": []}
    for member in structure.members[axis.name]:
        known = structure.aliases.get(member.parameter, member.parameter)
        if member.role in weights and len(structure.layouts[known]) >= 2 and known not in structure.buffers:
            weights[member.role] += _matrices(read(known), structure, axis, member)
    for role, found in weights.items():
        if not found:
            raise StructureError(
                f"{axis.name}: no weight matrix is its {role}, so 'prunenet' cannot score it; protect it."
            )
    producers, consumers = weights["producer"], weights["consumer"]
    scale = torch.stack([_norms(matrix) for matrix in producers]).prod(0)
    parts = {
        "gate": producers[:1],
        "gate_up": producers,
        "group": producers + consumers,
        "write": [matrix * scale[:, None, None] for matrix in consumers],
    }[state]
    rows = parts[0] if len(parts) == 1 else _beside(parts)
    return UnitMatrix(rows, scale, torch.stack([_norms(matrix) for matrix in consumers]).square().sum(0).sqrt())


def _matrices(weight: Tensor, structure: Structure, axis: Axis, member: Member) -> list[Tensor]:
    """The slices of each unit, `[U, b, rest]`; of an MLP one matrix for each time the axis occurs (`[I + I]`)."""
    ids = lay.unit_ids(structure.layouts[member.parameter][member.dim], axis.name)
    stacked = list(range(ids.dim() - 1))  # the dimension of the blocks, where they are one
    flat = weight.detach().movedim([*stacked, member.dim], [*stacked, len(stacked)]).float().cpu()
    ids, flat = ids.flatten(), flat.flatten(0, len(stacked)).flatten(1)
    where = (ids >= 0).nonzero()[:, 0]
    where = where[ids[where].argsort(stable=True)].reshape(axis.num_units, -1)
    slices = flat[where]
    return [slices[:, i : i + 1] for i in range(slices.shape[1])] if axis.branch == "mlp" else [slices]


def _norms(matrix: Tensor) -> Tensor:
    return matrix.square().sum((1, 2)).sqrt()


def _beside(parts: list[Tensor]) -> Tensor:
    """One matrix of several: side by side where units have one row each, else below each other."""
    if all(part.shape[1] == 1 for part in parts):
        return torch.cat(parts, dim=2)
    width = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[2])) for part in parts], dim=1)
