"""LLM-Pruner (arXiv 2305.11627): importance of coupled groups from gradients on a few samples.

`w` is a weight, `g` the gradient of the mean loss over the samples, `g_n` that of sample n alone. Per matrix and unit,
over the unit's slice: `vector` Σ|Σ w·g|, the inner sum over one row or column, `first_order` Σ|w·g|, `second_order`
Σ w²·F, `mixed` Σ|w·g − ½·w²·F|, where F is the sum (eq. 5) or the mean (the released code) of g_n² over the samples.
`fisher` is our own: see `fisher.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch
from accelerate import PartialState
from torch import Tensor

from hf_prune.config import LLMPrunerConfig, PruningConfig, selected_axes
from hf_prune.layers.processes import sum_over_processes
from hf_prune.scores.fisher import fisher_scores
from hf_prune.structure import layouts as lay
from hf_prune.structure.axes import Kind

if TYPE_CHECKING:
    from hf_prune.layers.walk import Found, Part, Walk
    from hf_prune.structure.axes import Axis, Structure

PER_SAMPLE = ("second_order", "mixed")
"""Criteria that need the gradient of each sample by itself."""


def llm_pruner_scores(
    walk: Walk, structure: Structure, config: PruningConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Importance of every unit: float32 `[num_units]` per selected axis, on the CPU; higher = keep.

    Sums are taken in float32 whatever the dtype of the weights. Each parameter's gradient is reduced to unit scores as
    soon as it is ready, and freed. `mixed`, and `first_order` with more than one batch or process, must add gradients
    up element by element before they take absolute values: they hold two (one) float32 tensors per touched parameter
    that is in memory. Works with `device_map`, and with gradient checkpointing as the caller set it. Deterministic.

    Raises:
        ScoreError: a loss is not finite.
    """
    assert isinstance(config, LLMPrunerConfig)
    if config.criterion == "fisher":
        return fisher_scores(walk, structure, config)
    axes = selected_axes(structure, config)
    one_pass = len(walk.all_ids) == 1 and PartialState().num_processes == 1
    walk = walk.per_sample() if config.criterion in PER_SAMPLE else walk
    importance = _Importance(walk, structure, axes, config, one_pass)
    name = f"{config.criterion} importance"
    found = walk.backward(importance.visit, name, wanted=importance.parameters, consume=importance.add)
    return importance.scores(found)


class _Importance:
    """Adds up what the gradients say: sums of units where samples simply add, of elements where |·| comes last."""

    def __init__(
        self, walk: Walk, structure: Structure, axes: list[Axis], config: LLMPrunerConfig, one_pass: bool
    ) -> None:
        self.walk, self.structure, self.axes, self.config = walk, structure, axes, config
        self.groups = {axis.name: structure.group(axis) for axis in axes}
        self.parameters = list(dict.fromkeys(name for names in self.groups.values() for name in names))
        additive = config.criterion in ("vector", "second_order")
        self.by_units = additive or (config.criterion == "first_order" and one_pass)
        self.sums: Found = {}
        self.gradients: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}

    def visit(self, part: Part) -> Found:
        """Sums over the batches for the parameters of this part: by axis, name and, for vectors, dimension."""
        self.sums = {}
        part.run()
        if not self.by_units:
            for name in self.parameters:
                if part.holds(name):
                    self._reduce(name, self._salience(name).abs_())
        return self.sums

    def add(self, name: str, gradient: Tensor) -> None:
        """Take in the gradient of one parameter in one pass."""
        gradient = gradient.float()
        if self.by_units:
            salience = self.walk.model.get_parameter(name).detach() * gradient  # in float32: the gradient is
            if self.config.criterion == "second_order":
                salience.square_()
            elif self.config.criterion == "first_order":
                salience.abs_()
            self._reduce_vectors(name, salience) if self.config.criterion == "vector" else self._reduce(name, salience)
            return
        self.gradients[name] = self.gradients[name].add_(gradient) if name in self.gradients else gradient
        if self.config.criterion == "mixed":
            self.squares[name] = (
                self.squares[name].addcmul_(gradient, gradient) if name in self.squares else gradient**2
            )

    def _salience(self, name: str) -> Tensor:
        """w·g, or w·g − ½·w²·F, of the mean loss over all samples of all processes."""
        num_samples = self.walk.num_samples
        weight = self.walk.model.get_parameter(name).detach().float()
        salience = weight * self._over_processes(self.gradients, name, weight) / num_samples
        if self.config.criterion == "mixed":
            squares = self._over_processes(self.squares, name, weight)
            salience -= weight.square() * squares / (2 * num_samples if self.config.normalisation == "mean" else 2)
        return salience

    def scores(self, found: Found) -> dict[str, Tensor]:
        """Scores of the mean loss over all samples of all processes."""
        num_samples = self.walk.num_samples
        summed = self.config.criterion == "second_order" and self.config.normalisation == "sum"
        divisor = 1 if summed or not self.by_units else num_samples
        scores = {}
        for axis in self.axes:
            per_parameter = {}
            for name in self.groups[axis.name]:
                if self.config.criterion == "vector" and axis.kind != "layer":
                    per_parameter[name] = self._vector_scores(axis, name, found) / num_samples
                    continue
                values = found.get(_key(axis.name, name), torch.zeros(axis.num_units)).float().cpu()
                per_parameter[name] = (sum_over_processes(values) if self.by_units else values).abs() / divisor
            scores[axis.name] = self._aggregate(axis, per_parameter)
        return scores

    @staticmethod
    def _over_processes(sums: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        return sum_over_processes(sums.pop(name) if name in sums else torch.zeros_like(like))

    def _reduce_vectors(self, name: str, salience: Tensor) -> None:
        """Sums along the rows (or columns) that the entries of an axis are; signs may still cancel between batches."""
        self._reduce(name, salience, kinds=("layer",))
        for axis in self.axes:
            if axis.kind != "layer" and name in self.groups[axis.name]:
                for dim, layout in enumerate(self.structure.layouts[name]):
                    if axis.name in lay.axes(layout):
                        line = lay.along(salience, dim, lay.unit_ids(layout, axis.name))
                        self._sum(_key(axis.name, name, dim), line.float())

    def _sum(self, key: str, values: Tensor) -> None:
        self.sums[key] = self.sums[key] + values if key in self.sums else values

    def _vector_scores(self, axis: Axis, name: str, found: Found) -> Tensor:
        """|sum of each row or column|, added up over those of a unit: `[num_units]`."""
        total = torch.zeros(axis.num_units)
        for dim, layout in enumerate(self.structure.layouts[name]):
            if axis.name in lay.axes(layout):
                ids = lay.unit_ids(layout, axis.name)
                line = found.get(_key(axis.name, name, dim), torch.zeros(ids.shape)).cpu()
                total.index_add_(0, ids[ids >= 0], sum_over_processes(line).abs()[ids >= 0])
        return total

    def _reduce(self, name: str, salience: Tensor, kinds: tuple[str, ...] = get_args(Kind)) -> None:
        for axis in self.axes:
            if name not in self.groups[axis.name] or axis.kind not in kinds:
                continue
            if axis.kind == "layer":
                part = salience.new_zeros(axis.num_units)
                part[self.structure.owners[name].layer] = salience.sum()
            else:
                part = lay.reduce(salience, self.structure.layouts[name], axis.name)
            self._sum(_key(axis.name, name), part)

    def _aggregate(self, axis: Axis, per_parameter: dict[str, Tensor]) -> Tensor:
        """One score per unit from the scores of the group's members."""
        how = self.config.aggregation
        if axis.kind == "layer":  # each unit has members of its own
            parts = [
                [v[unit] for n, v in per_parameter.items() if self.structure.owners[n].layer == unit]
                for unit in range(axis.num_units)
            ]
            return torch.stack([_combine(torch.stack(p)[:, None], how)[0] if p else torch.zeros(()) for p in parts])
        names = list(per_parameter)
        if how == "last":
            consumers = {member.parameter for member in self.structure.members[axis.name] if member.role == "consumer"}
            names = [name for name in names if name in consumers] or names[-1:]
        return _combine(torch.stack([per_parameter[name] for name in names]), how)


def _key(axis: str, name: str, dim: int | None = None) -> str:
    return f"{axis} {name}" if dim is None else f"{axis} {name} {dim}"


def _combine(scores: Tensor, how: str) -> Tensor:
    """`[members, units]` → `[units]`. The product is taken as geometric mean: the same order, without underflow."""
    if how in ("sum", "last"):
        return scores.sum(0)
    if how == "mean":
        return scores.mean(0)
    if how == "max":
        return scores.amax(0)
    if how == "product":
        return scores.clamp_min(torch.finfo(torch.float32).tiny).log().mean(0).exp()
    return scores[0]
