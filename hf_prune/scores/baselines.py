"""Baselines: random, magnitude, and weight times input norm."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_prune.config import MagnitudeConfig, PruningConfig, selected_axes
from hf_prune.errors import StructureError
from hf_prune.layers.processes import sum_over_processes
from hf_prune.layers.watch import watching
from hf_prune.layers.weights import eager_experts, read_weight
from hf_prune.structure import layouts as lay
from hf_prune.structure.consumers import Consumer, consumers_of

if TYPE_CHECKING:
    from hf_prune.layers.walk import Found, Part, Walk
    from hf_prune.structure.axes import Axis, Structure

logger = logging.getLogger(__name__)


def random_scores(
    walk: Walk, structure: Structure, config: PruningConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Uniform random scores in [0, 1): float32 `[num_units]` per selected axis, on the CPU. Looks at nothing."""
    return {axis.name: torch.rand(axis.num_units, generator=generator) for axis in selected_axes(structure, config)}


@torch.no_grad()
def magnitude_scores(
    walk: Walk, structure: Structure, config: PruningConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Norm of each unit's group: L1 = Σ|w|, L2 = √Σw², over all parameters that carry the unit, biases included.

    A unit of a layer axis is the whole layer, or its branch. Summed in float32; a tied parameter counts once. One
    parameter is in memory at a time.

    Returns:
        float32 `[num_units]` per selected axis, on the CPU.
    """
    l1 = isinstance(config, MagnitudeConfig) and config.norm == "l1"
    totals = {axis.name: torch.zeros(axis.num_units) for axis in selected_axes(structure, config)}
    uses: dict[str, list[Axis]] = {}
    for axis in selected_axes(structure, config):
        for name in structure.group(axis):
            uses.setdefault(name, []).append(axis)
    in_order = [name for name in structure.layouts if name in uses]
    for name in tqdm(in_order, desc="magnitude", unit="matrix", leave=False):
        weight = read_weight(walk.model, name).float()
        powers = weight.abs() if l1 else weight.square()
        for axis in uses[name]:
            if axis.kind == "layer":
                totals[axis.name][structure.owners[name].layer] += powers.sum().cpu()
            else:
                totals[axis.name] += lay.reduce(powers, structure.layouts[name], axis.name).cpu()
    return totals if l1 else {name: total.sqrt() for name, total in totals.items()}


def wanda_scores(
    walk: Walk, structure: Structure, config: PruningConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weight times input norm, S_ij = |W_ij|·‖X_j‖₂, summed over each unit (Wanda, arXiv 2306.11695, eq. 1).

    By structures, as Wanda-sp in FLAP (arXiv 2312.11983): a unit's score is the sum of S over the entries that consume
    it (columns of `down_proj`, of `o_proj`; for `hidden`, columns of everything that reads the stream). X are the
    inputs over all calibration tokens, for an expert those routed to it. A unit of a layer axis has the sum over all
    linear weights of the layer, or of its branch. Where no consumer's input can be observed, S_ij = |W_ij| for that
    axis, and a warning names it. Deterministic; summed in float32; one forward pass.

    Returns:
        float32 `[num_units]` per selected axis, on the CPU.
    """
    axes = selected_axes(structure, config)
    wanted = _consumers(walk, structure, axes)
    uses = {
        consumer: [axis for axis in axes if consumer in wanted[axis.name]]
        for axis in axes
        for consumer in wanted[axis.name]
    }
    norms = input_norms(walk, list(uses))
    seen = {axis.name: any(consumer.parameter in norms for consumer in wanted[axis.name]) for axis in axes}
    for axis in axes:
        if not seen[axis.name]:
            logger.warning("%s: no input of its consumers could be observed; wanda uses |W| there", axis.name)
    scores = {axis.name: torch.zeros(axis.num_units) for axis in axes}
    for consumer, own in uses.items():
        name, norm = consumer.parameter, norms.get(consumer.parameter)
        metric = _metric(read_weight(walk.model, name), consumer.dim, norm)
        for axis in own:
            if norm is None and seen[axis.name]:
                continue  # |W| is on another scale than |W|·‖X‖
            if axis.kind == "layer":
                scores[axis.name][structure.owners[name].layer] += metric.sum().cpu()
            else:
                layout = structure.layouts[name][consumer.dim]
                scores[axis.name] += lay.reduce_dim(metric, layout, consumer.dim, axis.name).cpu()
    return scores


def input_norms(walk: Walk, consumers: list[Consumer]) -> dict[str, Tensor]:
    """Measure the norm of every input channel of weights, over all calibration tokens, in one forward pass.

    Returns:
        For each weight whose input was seen: float32 `[channels]`, or `[experts, channels]` for weights of experts: the
        root of the sum of squares (summed in float32). Weights never seen are left out.
    """

    def visit(part: Part) -> Found:
        sums: Found = {}

        def add(consumer: Consumer, first: int, x: Tensor) -> None:
            squares = x.float().square().flatten(1, -2).sum(1)
            if consumer.kind == "experts":
                experts = len(walk.model.get_parameter(consumer.parameter))
                total = squares.new_zeros(experts, squares.shape[1])
                total[first : first + len(x)] = squares
            else:
                total = squares[0]
            name = consumer.parameter
            sums[name] = sums[name] + total if name in sums else total

        here = [consumer for consumer in consumers if part.holds(consumer.parameter)]
        with watching(walk.model, here, given=add):
            part.run()
        return sums

    outside = any(walk.layer_of(consumer.parameter) is None for consumer in consumers)
    with eager_experts(walk.model) if any(c.kind == "experts" for c in consumers) else contextlib.nullcontext():
        found = walk.forward(visit, "wanda", outside=outside)
    seen = sum_over_processes(torch.tensor([float(consumer.parameter in found) for consumer in consumers])).tolist()
    norms = {}
    for consumer in (consumer for consumer, times in zip(consumers, seen, strict=True) if times):
        shape = walk.model.get_parameter(consumer.parameter).shape
        size = (*shape[:1], shape[consumer.dim]) if consumer.kind == "experts" else (shape[consumer.dim],)
        squares = found.get(consumer.parameter, torch.zeros(size))  # other processes have seen it
        norms[consumer.parameter] = sum_over_processes(squares).sqrt()
    return norms


def _metric(weight: Tensor, dim: int, norms: Tensor | None) -> Tensor:
    """|W|·‖X‖, with `norms` along `dim` (`[channels]`), for each expert its own (`[experts, channels]`)."""
    if norms is None:
        return weight.float().abs()
    shape = [1] * weight.dim()
    shape[dim] = weight.shape[dim]
    if norms.dim() == 2:
        shape[0] = weight.shape[0]
    return weight.float().abs() * norms.to(weight.device).reshape(shape)


def _consumers(walk: Walk, structure: Structure, axes: list[Axis]) -> dict[str, list[Consumer]]:
    """The weight matrices that consume each axis; of an axis of layers, all that the layers consume with."""
    everything: dict[str, Consumer] = {}
    for name in structure.members:
        for consumer in consumers_of(walk.model, structure, name):
            if consumer.parameter not in structure.buffers and len(structure.layouts[consumer.parameter]) >= 2:
                everything[consumer.parameter] = consumer
    found = {}
    for axis in axes:
        if axis.kind == "layer":
            names = structure.group(axis)
        else:
            names = [member.parameter for member in structure.members[axis.name] if member.role == "consumer"]
        found[axis.name] = [everything[name] for name in dict.fromkeys(names) if name in everything]
        if not found[axis.name]:
            raise StructureError(
                f"{axis.name}: no operation consumes this axis, so 'wanda' cannot score it; protect it."
            )
    return found
