"""Which axes of a structure a configuration lets lose units."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from hf_prune.errors import ConfigError, StructureError

if TYPE_CHECKING:
    from hf_prune.config.base import AxisKind, PruningConfig
    from hf_prune.structure.axes import Axis, Structure

LAYER_AXES: dict[str, str] = {"layer": "layers", "layer_attention": "layers.attention", "layer_mlp": "layers.mlp"}
"""Kinds whose units are decoder layers (or one branch of them) → name of the axis in the structure."""


def selected_axes(structure: Structure, config: PruningConfig) -> list[Axis]:
    """The axes that `config` lets lose units: of its kinds, prunable, in its layers, not protected.

    Where channels of experts are selected with sets of their own, the same channels of all experts are not.

    Raises:
        StructureError: the model has no axis of a kind asked for, or all of them are blocked.
        ConfigError: `layers` names a layer, or `protect` an axis, that the model does not have.
    """
    _check_names(structure, config)
    selected: list[Axis] = []
    for kind in config.axes:
        candidates = axes_of_kind(structure, kind)
        if not candidates:
            raise StructureError(
                f"this {structure.model_type} model has no axis of kind {kind!r}: none was found. "
                f"Ask for other axes than {config.axes}."
            )
        if not any(axis.prunable for axis in candidates):
            reasons = sorted({axis.blocker or f"it has {axis.num_units} unit" for axis in candidates})
            raise StructureError(
                f"no axis of kind {kind!r} of this {structure.model_type} model can be pruned: {'; '.join(reasons)}. "
                f"Ask for other axes than {config.axes}."
            )
        selected += [axis for axis in candidates if axis.prunable and _is_selected(axis, config)]
    finer = {axis.tied for axis in selected}
    return [axis for axis in selected if axis.name not in finer]


def axes_of_kind(structure: Structure, kind: AxisKind) -> list[Axis]:
    """All axes of `structure` that a kind of `PruningConfig.axes` means, prunable or not, in layer order."""
    if kind in LAYER_AXES:
        return [structure.axes[LAYER_AXES[kind]]] if LAYER_AXES[kind] in structure.axes else []
    return [axis for axis in structure.axes.values() if axis.kind == kind]


def is_protected(config: PruningConfig, *names: str) -> bool:
    """Whether a pattern of `config.protect` matches one of `names`."""
    return any(fnmatchcase(name, pattern) for pattern in config.protect for name in names)


def layer_unit_names(structure: Structure, axis_name: str, layer: int) -> list[str]:
    """What one unit of a layer axis goes by in `protect`: the layer, its branches, and the axes that go with it."""
    inside = [axis for axis in structure.axes.values() if axis.layer == layer]
    branches = [f"layers.{layer}.attention", f"layers.{layer}.mlp"]
    if axis_name == "layers":
        return [f"layers.{layer}", *branches, *(axis.name for axis in inside)]
    branch = axis_name.partition(".")[2]
    return [f"layers.{layer}.{branch}", *(axis.name for axis in inside if axis.branch == branch)]


def removable(structure: Structure, config: PruningConfig, axis_name: str, layer: int) -> bool:
    """Whether `config` lets this unit of a layer axis go. The attention of layer 0 stays: caches are measured by it."""
    outside = config.layers is not None and layer not in config.layers
    first = layer == 0 and axis_name == "layers.attention"
    return not (outside or first or is_protected(config, *layer_unit_names(structure, axis_name, layer)))


def _is_selected(axis: Axis, config: PruningConfig) -> bool:
    outside = axis.layer is not None and config.layers is not None and axis.layer not in config.layers
    return not outside and not is_protected(config, axis.name)


def _check_names(structure: Structure, config: PruningConfig) -> None:
    num_layers = len(structure.layer_paths)
    if config.layers is not None and max(config.layers) >= num_layers:
        raise ConfigError(
            f"layers: found {max(config.layers)}, expected 0 to {num_layers - 1}: so many has this model."
        )
    names = {name for layer in range(num_layers) for name in layer_unit_names(structure, "layers", layer)}
    names.update(structure.axes)
    for pattern in config.protect:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"protect: {pattern!r} matches none of the axes: {', '.join(sorted(names)[:8])}, ...")
