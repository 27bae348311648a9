"""Baselines: random, magnitude, and weight times input norm."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_prune.config import MagnitudeConfig, PruningConfig, selected_axes
from hf_prune.errors import CalibrationError, StructureError
from hf_prune.methods.calibration import Batch, input_norms
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hf_prune.structure.structure import Axis, Member, Structure

logger = logging.getLogger(__name__)


def random_scores(
    model: nn.Module,
    structure: Structure,
    config: PruningConfig,
    *,
    batches: Iterable[Batch] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Uniform random scores in [0, 1): float32 `[num_units]` per selected axis, on the CPU.

    Draws from `generator`, or from a new one seeded with `config.seed`. Uses neither weights nor `batches`.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(config.seed)
    return {axis.name: torch.rand(axis.num_units, generator=generator) for axis in selected_axes(structure, config)}


def magnitude_scores(
    model: nn.Module,
    structure: Structure,
    config: PruningConfig,
    *,
    batches: Iterable[Batch] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Norm of each unit's group: L1 = Σ|w|, L2 = √Σw², over all parameters that carry the unit, biases included.

    A unit of a layer axis is the whole layer, or its branch. Summed in float32; a tied parameter counts once.

    Returns:
        float32 `[num_units]` per selected axis, on the CPU.
    """
    l1 = isinstance(config, MagnitudeConfig) and config.norm == "l1"
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def powers(weight: Tensor) -> Tensor:
        return weight.float().abs() if l1 else weight.float().square()

    scores = {}
    with torch.no_grad():
        for axis in selected_axes(structure, config):
            total = torch.zeros(axis.num_units)
            if axis.kind == "layer":
                for unit in range(axis.num_units):
                    for name in structure.parameters_of_layer(axis.name, unit):
                        total[unit] += powers(parameters[name]).sum().cpu()
            else:
                members = structure.members[axis.name]
                for name in sorted(
                    {structure.aliases.get(m.parameter, m.parameter) for m in members} & set(parameters)
                ):
                    total += lay.reduce(powers(parameters[name]), structure.layouts[name], axis.name).cpu()
            scores[axis.name] = total if l1 else total.sqrt()
    return scores


def wanda_scores(
    model: nn.Module,
    structure: Structure,
    config: PruningConfig,
    *,
    batches: Iterable[Batch] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Weight times input norm, S_ij = |W_ij|·‖X_j‖₂, summed over each unit (Wanda, arXiv 2306.11695, eq. 1).

    By structures, as Wanda-sp in FLAP (arXiv 2312.11983): a unit's score is the sum of S over the entries that consume
    it (columns of `down_proj`, of `o_proj`; for `hidden`, columns of everything that reads the stream). X are the
    inputs over all calibration tokens, for an expert those routed to it. A unit of a layer axis has the sum over all
    linear weights of the layer, or of its branch. Where no consumer's input can be observed, S_ij = |W_ij| for that
    axis, and a warning names it. Deterministic; summed in float32; the model is left as it was.

    Returns:
        float32 `[num_units]` per selected axis, on the CPU.

    Raises:
        CalibrationError: no `batches`, or unusable ones.
    """
    if batches is None:
        raise CalibrationError("method 'wanda' needs calibration batches and found none: give a calibration text.")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    everything = _consumers(structure, parameters)
    selected = selected_axes(structure, config)
    wanted = {axis.name: _consumers_of(structure, axis, everything) for axis in selected}
    inputs = {member.parameter: member.dim for units in wanted.values() for members in units for member in members}
    norms = input_norms(model, inputs, batches)

    scores = {}
    with torch.no_grad():
        for axis in selected:
            seen = any(member.parameter in norms for members in wanted[axis.name] for member in members)
            if not seen:
                logger.warning("%s: no input of its consumers could be observed; wanda uses |W| there", axis.name)
            total = torch.zeros(axis.num_units)
            for unit, members in enumerate(wanted[axis.name]):
                for member in members:
                    if seen and member.parameter not in norms:
                        continue  # |W| is on another scale than |W|·‖X‖
                    metric = _metric(parameters[member.parameter], member.dim, norms.get(member.parameter))
                    if axis.kind == "layer":
                        total[unit] += metric.sum().cpu()
                    else:
                        total += lay.reduce_dim(
                            metric, structure.layouts[member.parameter][member.dim], member.dim, axis.name
                        ).cpu()
            scores[axis.name] = total
    return scores


def _metric(weight: Tensor, dim: int, norms: Tensor | None) -> Tensor:
    """|W|·‖X‖, with `norms` along `dim` (`[channels]`), for each expert its own (`[experts, channels]`)."""
    if norms is None:
        return weight.float().abs()
    shape = [1] * weight.dim()
    shape[dim] = weight.shape[dim]
    if norms.dim() == 2:
        shape[0] = weight.shape[0]
    return weight.float().abs() * norms.to(weight.device).reshape(shape)


def _consumers(structure: Structure, parameters: dict[str, nn.Parameter]) -> dict[str, Member]:
    """The consumer dimension of each weight that has one; a tied weight under the name that consumes."""
    return {
        member.parameter: member
        for members in structure.members.values()
        for member in members
        if member.role == "consumer" and member.parameter in parameters and parameters[member.parameter].dim() >= 2
    }


def _consumers_of(structure: Structure, axis: Axis, everything: dict[str, Member]) -> list[list[Member]]:
    """Consumers of each unit of a layer axis; of any other axis one list for all units."""
    if axis.kind == "layer":
        return [
            [everything[name] for name in structure.parameters_of_layer(axis.name, unit) if name in everything]
            for unit in range(axis.num_units)
        ]
    members = [m for m in structure.members[axis.name] if m.role == "consumer" and m.parameter in everything]
    if not members:
        raise StructureError(f"{axis.name}: no operation consumes this axis, so 'wanda' cannot score it; protect it.")
    return [members]
