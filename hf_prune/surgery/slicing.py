"""Slice named tensors: a pure function of a state dict, a structure and a plan; it can stream a checkpoint too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_prune.errors import PlanError
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure


def slice_state_dict(state_dict: Mapping[str, Tensor], structure: Structure, plan: PruningPlan) -> dict[str, Tensor]:
    """Keep the units that `plan` keeps. Pure: the result shares no memory with `state_dict`.

    Args:
        state_dict: tensors of the dense model by name.
        structure: structure of the dense model.
        plan: kept units per axis, removed layers and branches.

    Returns:
        Tensors of the pruned model by their new names (later layers move up when layers go). Tied names share one
        tensor.

    Raises:
        PlanError: a tensor is not part of the structure, or has another shape than it.
    """
    result: dict[str, Tensor] = {}
    done: dict[int, Tensor] = {}
    for name, tensor, new_name in _kept_names(state_dict, structure, plan):
        if id(tensor) not in done:
            done[id(tensor)] = slice_tensor(name, tensor, structure, plan)
        result[new_name] = done[id(tensor)]
    return result


def slice_tensor(name: str, tensor: Tensor, structure: Structure, plan: PruningPlan) -> Tensor:
    """One tensor with only its kept units; always a copy. See `slice_state_dict`."""
    check_tensor(name, tensor, structure)
    sliced = tensor.detach()
    for dim, layout in enumerate(structure.layouts[name]):
        if any(axis in plan.kept_indices for axis in lay.axes(layout)):
            kept = lay.kept_positions(structure.layouts[name], dim, plan.kept_indices).to(tensor.device)
            if kept.dim() == 1:
                sliced = sliced.index_select(dim, kept)
            else:  # the first dimension holds the blocks that stay
                sliced = torch.stack([one.index_select(dim - 1, own) for one, own in zip(sliced, kept, strict=True)])
    return (
        sliced
        if sliced.data_ptr() != tensor.data_ptr() or tensor.is_meta
        else sliced.clone(memory_format=torch.contiguous_format)
    )


def pad_tensor(name: str, tensor: Tensor, structure: Structure, plan: PruningPlan) -> Tensor:
    """The inverse of `slice_tensor`: the shape of the dense tensor, zero in the units that `plan` removes."""
    found, expected = tuple(tensor.shape), structure.shape(name, plan.widths)
    if found != expected:
        raise PlanError(f"{name}: found shape {found}, the plan leaves {expected}.")
    padded = tensor.detach()
    for dim, layout in reversed(list(enumerate(structure.layouts[name]))):
        if any(axis in plan.kept_indices for axis in lay.axes(layout)):
            wider = padded.new_zeros(*padded.shape[:dim], lay.size(layout, {}), *padded.shape[dim + 1 :])
            kept = lay.kept_positions(structure.layouts[name], dim, plan.kept_indices).to(tensor.device)
            if kept.dim() == 1:
                padded = wider.index_copy_(dim, kept, padded)
                continue
            for one, own, part in zip(wider, kept, padded, strict=True):
                one.index_copy_(dim - 1, own, part)
            padded = wider
    return padded


def on_axis(axis: str, structure: Structure, name: str) -> bool:
    """Whether a dimension of the tensor `name` carries an axis."""
    return any(axis in lay.axes(layout) for layout in structure.layouts[name])


def check_tensor(name: str, tensor: Tensor, structure: Structure) -> None:
    """Raise `PlanError` unless `structure` describes this tensor."""
    if name not in structure.layouts:
        raise PlanError(f"{name}: this tensor is not part of the structure of {structure.model_type}.")
    if tuple(tensor.shape) != structure.shape(name):
        raise PlanError(f"{name}: found shape {tuple(tensor.shape)}, the structure has {structure.shape(name)}.")


def pruned_name(name: str, structure: Structure, plan: PruningPlan) -> str | None:
    """Name of a tensor in the pruned model: `None` if it goes, another layer number if layers before it go."""
    owner = structure.owners.get(name)
    if owner is None:
        return name
    if owner.layer in plan.removed_layers or (owner.layer, owner.branch) in plan.removed_branches:
        return None
    return renumber(name, owner.layer, structure, plan)


def renumber(path: str, layer: int, structure: Structure, plan: PruningPlan) -> str:
    """`path`, inside layer `layer` of the dense model, as a path of the pruned model."""
    before = sum(1 for removed in plan.removed_layers if removed < layer)
    if not before:
        return path
    old = structure.layer_paths[layer]
    return f"{old.rpartition('.')[0]}.{layer - before}{path.removeprefix(old)}"


def renamed(path: str, structure: Structure, plan: PruningPlan) -> str | None:
    """Path of a module or buffer in the pruned model; `None` if its layer goes."""
    for layer, layer_path in enumerate(structure.layer_paths):
        if f"{path}.".startswith(f"{layer_path}."):
            return None if layer in plan.removed_layers else renumber(path, layer, structure, plan)
    return path


def _kept_names(
    state_dict: Mapping[str, Tensor], structure: Structure, plan: PruningPlan
) -> Iterator[tuple[str, Tensor, str]]:
    for name, tensor in state_dict.items():
        new_name = pruned_name(name, structure, plan)
        if new_name is not None:
            yield name, tensor, new_name
