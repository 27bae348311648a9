"""Optimal brain surgeon by structures: loss increase from removing each unit after refitting.

Hassibi and Stork (1993); by structures ZipLM (arXiv 2302.04089), with gradients LLM Surgeon (arXiv 2312.17244). With
H = Σ x xᵀ over the inputs of the consumer of an axis (centred if it has a bias) and its weight W, removing the entries
B of a unit raises the squared error of the repaired output by tr(W_B (H⁻¹_BB)⁻¹ W_Bᵀ). Units go one after the other,
the cheapest first, and W and H⁻¹ are brought up to date each time. A squared error e of the output changes the loss by
½·g²·e to second order, g² the mean square of the loss gradient there: this makes all axes compare. H is shrunk
towards its diagonal: what other units can say on the calibration text they may not be able to say on another.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_prune.config import OBSConfig, PruningConfig, selected_axes
from hf_prune.errors import StructureError
from hf_prune.layers.processes import sum_over_processes
from hf_prune.layers.statistics import Statistics, solving
from hf_prune.layers.watch import watching
from hf_prune.layers.weights import eager_experts
from hf_prune.scores.elimination import removal_costs
from hf_prune.structure.consumers import Consumer, only_consumer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hf_prune.layers.walk import Found, Part, Walk
    from hf_prune.structure.axes import Structure


def obs_scores(
    walk: Walk, structure: Structure, config: PruningConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Loss increase from removing each unit after refitting, in nested order: nats per token.

    One forward pass, and one backward pass layer by layer without weight gradients, which shows both H and the
    gradients at the outputs of the consumers: memory is that of the consumers of one layer, a few times their Gram
    matrix. Each expert has an H of its own, over the tokens routed to it. `repair_ridge` is added to H, as a fraction
    of its mean diagonal. Deterministic.

    Returns:
        float32 `[num_units]` per selected axis, on the CPU; higher = keep. Never lower than that of a unit that goes
        before.

    Raises:
        CalibrationError: activations that are not finite.
        StructureError: an axis that is not consumed by one linear layer or by experts.
        ScoreError: a loss is not finite.
    """
    assert isinstance(config, OBSConfig)
    consumers: list[Consumer] = []
    for axis in selected_axes(structure, config):
        found = only_consumer(walk.model, structure, axis.name)
        if found is None:
            raise StructureError(
                f"{axis.name}: 'obs' scores axes that one linear layer or the experts of a layer consume, and found "
                "something else (a convolution). Protect this axis, or use method 'llm_pruner'."
            )
        consumers.append(found)

    def visit(part: Part) -> Found:
        here = [consumer for consumer in consumers if part.holds(consumer.parameter)]
        gradients = SquaredGradients(walk, here)
        with collecting(walk.model, structure, here) as grams, gradients.watching():
            part.run(gradients.each)
        costs = {}
        for consumer in here:
            loss_weights = gradients.mean(consumer) / (2 * walk.num_tokens)
            sums = [found.over_processes() for found in grams.pop(consumer)]
            costs[consumer.axis] = costs_of(
                walk.model, structure, consumer, sums, 0, config.repair_ridge, config.shrinkage, loss_weights.tolist()
            )
        return {name: values.float().cpu() for name, values in costs.items()}

    with eager_experts(walk.model):
        scores = walk.backward(visit, "obs importance", layered=True)
    return {consumer.axis: scores[consumer.axis] for consumer in consumers}


class SquaredGradients:
    """Mean square of the gradient of the summed loss by the output of each consumer, over channels and tokens.

    For an expert over the tokens routed to it, its output before it is weighted.
    """

    def __init__(self, walk: Walk, consumers: Iterable[Consumer]) -> None:
        self._walk, self._consumers = walk, list(consumers)
        self._factor = 0.0
        self._totals = {c: torch.zeros(2, num_matrices(walk.model, c), dtype=torch.float64) for c in self._consumers}

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Hooks on the consumers."""
        return watching(self._walk.model, self._consumers, gradient=self._take)

    @contextlib.contextmanager
    def each(self, batch: int) -> Iterator[None]:
        """While a batch runs; the loss of a walk is a mean over its tokens."""
        self._factor = (self._walk.ids[batch].shape[1] - 1) / self._walk.scale
        yield

    def mean(self, consumer: Consumer) -> Tensor:
        """Over all batches and processes: float64 `[1]`, or `[experts]`."""
        totals = sum_over_processes(self._totals[consumer])
        return totals[0] / totals[1].clamp_min(1)

    def _take(self, consumer: Consumer, first: int, used: int, gradient: Tensor) -> None:
        rows = (gradient.float() * self._factor).reshape(used, -1)
        total = self._totals[consumer]
        total[0, first : first + used] += rows.square().sum(1, dtype=torch.float64).cpu()
        total[1, first : first + used] += rows.shape[1]


@contextlib.contextmanager
def collecting(
    model: nn.Module, structure: Structure, consumers: Sequence[Consumer]
) -> Iterator[dict[Consumer, list[Statistics]]]:
    """Within, sums over the inputs of consumers (of each of their experts) are taken; yields where they come."""
    grams = no_sums(model, structure, consumers)

    def add(consumer: Consumer, first: int, x: Tensor) -> None:
        for statistics, own in zip(grams[consumer][first:], x, strict=False):
            statistics.add(own, own.new_zeros(*own.shape[:-1], 0))

    with watching(model, consumers, given=add):
        yield grams


def no_sums(model: nn.Module, structure: Structure, consumers: Sequence[Consumer]) -> dict[Consumer, list[Statistics]]:
    """Sums over the inputs of consumers (of each of their experts), of no token so far."""
    grams: dict[Consumer, list[Statistics]] = {}
    for consumer in consumers:
        size, device = consumer.units(structure).shape[-1], model.get_parameter(consumer.parameter).device
        grams[consumer] = [Statistics(size, 0, device) for _ in range(num_matrices(model, consumer))]
    return grams


def num_matrices(model: nn.Module, consumer: Consumer) -> int:
    """Experts, or 1 for a linear layer."""
    return len(model.get_parameter(consumer.parameter)) if consumer.kind == "experts" else 1


def costs_of(
    model: nn.Module,
    structure: Structure,
    consumer: Consumer,
    statistics: Sequence[Statistics],
    width: int,
    ridge: float,
    shrinkage: float = 0.0,
    loss_weights: Sequence[float] | None = None,
) -> Tensor:
    """`removal_costs` of the axis of a consumer, with (1 − shrinkage) H + shrinkage · diag H in place of H.

    The weight of the consumer is in memory.
    """
    centred = consumer.bias(model) is not None
    grams = (_shrunk(found.symmetric_gram(centred), shrinkage) for found in statistics)
    matrices = consumer.matrices(model.get_parameter(consumer.parameter).detach())
    loss_weights = loss_weights or [1.0] * len(statistics)
    units, num_blocks = consumer.units(structure), structure.axes[consumer.axis].num_blocks
    each = structure.axes[consumer.axis].num_units // num_blocks
    with solving(consumer.axis):
        if units.dim() == 1:
            return removal_costs(grams, matrices, units, width, ridge, loss_weights, num_blocks)
        costs = [  # each expert by itself
            removal_costs([gram], [matrix], own, width // num_blocks, ridge, [weight])
            for gram, matrix, own, weight in zip(grams, matrices, units % each, loss_weights, strict=True)
        ]
        return torch.cat(costs)


def _shrunk(gram: Tensor, shrinkage: float) -> Tensor:
    """In place, towards its diagonal."""
    diagonal = gram.diagonal().clone()
    gram.mul_(1 - shrinkage).diagonal().copy_(diagonal)
    return gram
