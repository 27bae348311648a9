"""Evolutionary search over the widths of all axes, for a fixed order of units in each.

As in OptiShear (arXiv 2502.10735) and Search for Efficient LLMs (arXiv 2409.17372): a small population, mixed and
mutated, judged by what the masked model says on a few thousand tokens. Each plan meets the budget as exactly as those
of the other allocations.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.allocation.budgets import spending_of
from hf_prune.allocation.ladders import state_after
from hf_prune.allocation.sequences import Share, by_fraction, nearest_prefix
from hf_prune.errors import BudgetError, CalibrationError, ConfigError
from hf_prune.layers.losses import divergence
from hf_prune.layers.masking import masked
from hf_prune.layers.price import GENERATION
from hf_prune.layers.processes import of_main_process, sum_over_processes
from hf_prune.layers.walk import Walk, checked_ids, images_of
from hf_prune.layers.weights import evaluating
from hf_prune.plan import first_change, make_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from hf_prune.allocation.ladders import Floats, RemovalOrder
    from hf_prune.config import PruningConfig
    from hf_prune.latency import LatencyTable
    from hf_prune.layers.boundaries import Boundaries
    from hf_prune.layers.walk import Batch, LayerProtocol
    from hf_prune.layers.work import WorkDir
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure

    Preview = Callable[[PruningPlan, int | None], AbstractContextManager[None]]

POPULATION = 8
"""Plans that may have children."""
MOST_FAILURES = 200
"""Children in a row that are known or miss the budget, after which the search ends."""
NEAR = 0.001
"""Of the dense model: how far from the asked budget any plan may be."""
Kept = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Candidate:
    """A plan to start from: steps taken on each ladder."""

    ladders: list[RemovalOrder]
    taken: list[int]


@dataclass(frozen=True)
class ScoredCandidate(Candidate):
    """A plan of the population."""

    divergence: float
    """Mean KL divergence of its next-token distribution from the dense one, in nats per token."""


def search(
    model: nn.Module,
    structure: Structure,
    config: PruningConfig,
    starts: Sequence[Candidate],
    batches: Iterable[Batch],
    latency: LatencyTable | None,
    preview: Preview | None = None,
    work: WorkDir | None = None,
    protocol: LayerProtocol | None = None,
) -> ScoredCandidate:
    """The plan with the least KL divergence found; on its windows never worse than the best of `starts`.

    Plans further from the budget than the nearest start (and than `NEAR`) do not count: removing less is no merit.
    Varied are the fraction that each axis loses and, of layer axes, which units go. Random draws come from a generator
    seeded with `config.seed`. The last hidden states of the dense model stay in memory, `search_samples · seq_len ·
    hidden_size` numbers, not its logits. Of a model on disk, `GENERATION` plans go through a layer together.

    Args:
        model: the dense model; left as it was.
        structure: its structure.
        config: budget and limits; `search_evaluations` plans are tried on the first `search_samples` windows.
        starts: plans within the budget, at least one.
        batches: calibration batches (`input_ids`, int64 `[B, T]`).
        latency: table for the budget `latency`.
        preview: context in which the dense model, masked by a plan, is also repaired; `None`: plans are judged as they
            are before repair.
        work: keeps what was measured, so that an interrupted search is resumed.
        protocol: how the model runs its layers, if that is known.

    Raises:
        ConfigError: the hidden axis is to be pruned, which cannot be masked.
        CalibrationError: no batch, or an unusable one.
    """
    generator = torch.Generator().manual_seed(config.seed)
    with (
        torch.no_grad(),
        evaluating(model),
        tqdm(total=config.search_evaluations, desc="search", unit="plan", leave=False) as bar,
    ):
        evaluator = Evaluator(model, structure, config, batches, preview, work, protocol)
        misses = [_miss(start, structure, config, latency) for start in starts]
        most = max(NEAR, min(misses)) + 1e-9
        population = evaluator.evaluate([start for start, miss in zip(starts, misses, strict=True) if miss <= most])
        spread, failures = 0.5, 0
        while evaluator.num_evaluations < config.search_evaluations and failures < MOST_FAILURES:
            population = sorted(population, key=lambda one: one.divergence)[:POPULATION]
            bar.n = evaluator.num_evaluations
            bar.set_postfix(kl=f"{population[0].divergence:.4f}")
            children: list[Candidate] = []
            keys: set[str] = set()
            wanted = min(GENERATION, config.search_evaluations - evaluator.num_evaluations)
            while len(children) < wanted and failures < MOST_FAILURES:
                child = _child(population, structure, config, latency, spread, generator)
                known = child is None or evaluator.knows(child) or evaluator.key(child) in keys
                if child is None or known or _miss(child, structure, config, latency) > most:
                    failures += 1  # few plans meet the budget, or all near ones are known: look further
                    spread = min(1.5, spread * 1.1)
                    continue
                failures = 0
                children.append(child)
                keys.add(evaluator.key(child))
            best = population[0].divergence
            for born in evaluator.evaluate(children):
                population.append(born)
                better = born.divergence < best
                # one child in about ten is better
                spread = min(1.5, spread * 1.5) if better else max(0.05, spread * 0.95)
    return min(population, key=lambda one: one.divergence)


def _child(
    population: list[ScoredCandidate],
    structure: Structure,
    config: PruningConfig,
    latency: LatencyTable | None,
    spread: float,
    generator: torch.Generator,
) -> Candidate | None:
    """A plan near one or two of the population (better ones are likelier parents); `None` if it misses the budget."""

    def draw(number: int) -> Floats:
        return torch.rand(number, generator=generator, dtype=torch.float64).numpy()

    first, second = (population[int(draw(2).min() * len(population))] for _ in range(2))
    number = len(first.ladders)
    weights = _weights(first)
    if draw(1)[0] < 0.3:
        weights = np.where(draw(number) < 0.5, weights, _weights(second))
    changed = draw(number) < max(0.3, 2 / number)
    normal = torch.randn(number, generator=generator, dtype=torch.float64).numpy()
    weights = weights * np.exp(spread * normal * changed)
    ladders = [
        _swapped(ladder, steps, draw(3)) if ladder.axis.kind == "layer" else ladder
        for ladder, steps in zip(first.ladders, first.taken, strict=True)
    ]
    spending = spending_of(ladders, structure, config, latency)
    try:
        sequence = by_fraction(ladders, [Share(float(weight)) for weight in weights], spending, config)
        return Candidate(ladders, nearest_prefix(ladders, sequence, spending, config))
    except BudgetError:
        return None


def _miss(start: Candidate, structure: Structure, config: PruningConfig, latency: LatencyTable | None) -> float:
    """How far a plan is from the budget, as a fraction of the dense model."""
    spending = spending_of(start.ladders, structure, config, latency)
    return abs(spending.removed(start.taken) / spending.base - config.pruning_ratio)


def _weights(start: Candidate) -> Floats:
    """The fractions that a plan removes, half a step more: with these weights the sequence passes through the plan."""
    gone = [len(ladder.removed(steps)) for ladder, steps in zip(start.ladders, start.taken, strict=True)]
    return np.array([(n + 0.5 * x.step) / x.axis.num_units for n, x in zip(gone, start.ladders, strict=True)])


def _swapped(ladder: RemovalOrder, steps: int, draws: Floats) -> RemovalOrder:
    """A ladder of layers where, every other time, one that goes and one that stays change places."""
    stays = len(ladder.order) - steps
    first = int(ladder.step_ends[ladder.num_taken - 1]) if ladder.num_taken else 0  # those before went earlier
    if steps <= first or not stays or draws[0] < 0.5:
        return ladder
    order = ladder.order.copy()
    one, other = first + int(draws[1] * (steps - first)), steps + int(draws[2] * stays)
    order[[one, other]] = order[[other, one]]
    return dataclasses.replace(ladder, order=order)


class Evaluator:
    """Measures plans on the first `search_samples` windows, each plan once; many at a time read the model once.

    With `boundaries` each plan is run from the first layer that it changes on, from the dense model's hidden states,
    which are kept for all layers (see `Boundaries`); so it is where the layers exchange nothing else.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        config: PruningConfig,
        batches: Iterable[Batch],
        preview: Preview | None,
        work: WorkDir | None,
        protocol: LayerProtocol | None,
        *,
        boundaries: bool = False,
    ) -> None:
        if "hidden" in config.axes:
            raise ConfigError(
                f"allocation {config.allocation!r} masks units, and the hidden axis cannot be masked: leave it out of "
                "axes."
            )
        windows, _ = split_windows(batches, config.search_samples)
        self._model, self._structure, self._config = model, structure, config
        self._preview = preview or (lambda plan, layer: contextlib.nullcontext())
        self._known: dict[str, float] = {}
        # what a plan loses depends on the windows, and on how repair would leave it
        how = f"{config.search_samples}-{'none' if preview is None else config.repair_ridge}"
        self._work = None if work is None else work.stage(f"search-{how}")
        found = None if self._work is None else self._work.load("divergences")
        self._stored: dict[str, float] = of_main_process(found[1] if found else {})
        self._walk = Walk(model, structure.layer_paths, windows, protocol=protocol)
        self._boundaries = self._walk.boundaries("dense model") if boundaries and self._walk.protocol.layered else None
        last = None if self._boundaries is None else self._boundaries.get(self._walk.num_layers)
        dense = self._walk.outputs() if last is None else map(self._walk.outputs_of, self._walk.ids, last)
        self._dense = [output.offloaded() for output in dense]

    @property
    def num_evaluations(self) -> int:
        """Plans that were measured."""
        return len(self._known)

    def knows(self, start: Candidate) -> bool:
        """Whether a plan was measured."""
        return self.key(start) in self._known

    def evaluate(self, starts: Sequence[Candidate]) -> list[ScoredCandidate]:
        """Plans with what they lose; those that are not known are measured together."""
        new = {key: start for start in starts if (key := self.key(start)) not in self._known}
        asked = {key: start for key, start in new.items() if key not in self._stored}
        if asked:
            plans = [make_plan(self._structure, self._kept(start), self._config, None) for start in asked.values()]
            at_once = len(plans) if self._walk.protocol.layered else 1  # else logits are held, not hidden states
            parts = [plans[first : first + at_once] for first in range(0, len(plans), at_once)]
            self._stored |= dict(zip(asked, itertools.chain(*map(self._divergences, parts)), strict=True))
            if self._work is not None:
                self._work.save("divergences", {}, self._stored)
        self._known |= {key: self._stored[key] for key in new}
        return [ScoredCandidate(start.ladders, start.taken, self._known[self.key(start)]) for start in starts]

    def _divergences(self, plans: list[PruningPlan]) -> list[float]:
        """Mean KL divergence of each plan, in nats per token."""
        number = len(self._dense)
        walk = self._walk.over(self._walk.ids * len(plans))
        walk.ids = walk.all_ids  # this process's windows, once for each plan

        @contextlib.contextmanager
        def each(batch: int, layer: int | None) -> Iterator[None]:
            plan = plans[batch // number]
            with self._preview(plan, layer), masked(self._model, self._structure, plan, layer):
                yield

        begins = None if self._boundaries is None else self._begins(plans, self._boundaries)
        found = [output.offloaded() for output in walk.outputs(each, begins)]
        totals = torch.zeros(len(plans), dtype=torch.float64)
        for batch, dense in enumerate(self._dense):
            for row, start, theirs in dense.chunks():  # the same for all plans: computed once
                for plan, output in enumerate(found[batch::number]):
                    ours = output.logits(row, start, start + len(theirs))
                    totals[plan] += divergence(theirs, ours).sum(dtype=torch.float64).cpu()
        values = (sum_over_processes(totals) / self._walk.num_tokens).tolist()
        return [math.inf if math.isnan(value) else value for value in values]

    def _begins(self, plans: list[PruningPlan], boundaries: Boundaries) -> list[tuple[int, Tensor]]:
        """For each plan and batch the first layer that changes, and the dense model's hidden states before it."""
        layers = [first_change(self._structure, plan)[0] for plan in plans]
        hidden = {layer: boundaries.get(layer) for layer in set(layers)}
        return [(layer, own) for layer in layers for own in hidden[layer]]

    def _kept(self, start: Candidate) -> Kept:
        return state_after(start.ladders, start.taken, self._structure, indices=True).kept

    def key(self, start: Candidate) -> str:
        """Tells plans apart."""
        kept = json.dumps(sorted(self._kept(start).items()))
        return hashlib.sha256(kept.encode()).hexdigest()


def split_windows(batches: Iterable[Batch], number: int) -> tuple[list[Batch | Tensor], list[Batch | Tensor]]:
    """The first `number` windows, by which plans are judged, and the others; in batches as they come.

    Each batch is `input_ids` `[B, T]`, or a whole one with images.
    """
    first: list[Batch | Tensor] = []
    others: list[Batch | Tensor] = []
    for batch in batches:
        ids = checked_ids(batch)
        here = min(number, len(ids))
        for taken, part in ((first, ids[:here]), (others, ids[here:])):
            if len(part):
                taken.append(batch if images_of(batch) else part)
        number -= here
    if not first:
        raise CalibrationError("allocation found no batch, expected one or more: give a calibration text.")
    return first, others
