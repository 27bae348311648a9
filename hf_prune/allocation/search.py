"""Evolutionary search over the widths of all axes, for a fixed order of units in each.

As in OptiShear (arXiv 2502.10735) and Search for Efficient LLMs (arXiv 2409.17372): a small population, mixed and
mutated, judged by what the masked model says on a few thousand tokens. Each plan meets the budget as exactly as those
of the other allocations.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from hf_prune.methods.calibration import checked_ids, evaluating, input_device
from hf_prune.plan import make_plan
from hf_prune.surgery.masking import masked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from hf_prune.allocation.ladders import Ladder
    from hf_prune.config import PruningConfig
    from hf_prune.latency import LatencyTable
    from hf_prune.methods.calibration import Batch
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.structure import Structure

    Preview = Callable[[PruningPlan], AbstractContextManager[None]]

POPULATION = 8
"""Plans that may have children."""
MOST_FAILURES = 200
"""Children in a row that are known or miss the budget, after which the search ends."""
NEAR = 0.001
"""Of the dense model: how far from the asked budget any plan may be."""
_CHUNK_ELEMENTS = 1 << 24
"""Logits compared at a time (64 MiB in float32), whatever the vocabulary."""

Kept = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Start:
    """A plan to start from: steps taken on each ladder."""

    ladders: list[Ladder]
    taken: list[int]


@dataclass(frozen=True)
class Individual(Start):
    """A plan of the population."""

    divergence: float
    """Mean KL divergence of its next-token distribution from the dense one, in nats per token."""


def search(
    model: nn.Module,
    structure: Structure,
    config: PruningConfig,
    starts: Sequence[Start],
    batches: Iterable[Batch],
    latency: LatencyTable | None,
    preview: Preview | None = None,
) -> Individual:
    """The plan with the least KL divergence found; on its windows never worse than the best of `starts`.

    Plans further from the budget than the nearest start (and than `NEAR`) do not count: removing less is no merit.
    Varied are the fraction that each axis loses and, of layer axes, which units go. Random draws come from a generator
    seeded with `config.seed`. The dense log-probabilities of the windows stay in memory, in the dtype of the logits:
    `search_samples · seq_len · vocab_size` numbers.

    Args:
        model: the dense model; left as it was.
        structure: its structure.
        config: budget and limits; `search_evaluations` plans are tried on the first `search_samples` windows.
        starts: plans within the budget, at least one.
        batches: calibration batches (`input_ids`, int64 `[B, T]`).
        latency: table for the budget `latency`.
        preview: context in which the dense model, masked by a plan, is also repaired; `None`: plans are judged as they
            are before repair.

    Raises:
        ConfigError: the hidden axis is to be pruned, which cannot be masked.
        CalibrationError: no batch, or an unusable one.
    """
    if "hidden" in config.axes:
        raise ConfigError(
            "allocation 'search' masks units, and the hidden axis cannot be masked: leave it out of axes."
        )
    windows = _windows(batches, config.search_samples)
    generator = torch.Generator().manual_seed(config.seed)
    with (
        torch.no_grad(),
        evaluating(model),
        tqdm(total=config.search_evaluations, desc="search", unit="plan", leave=False) as bar,
    ):
        judge = _Judge(model, structure, config, windows, preview)
        misses = [_miss(start, structure, config, latency) for start in starts]
        most = max(NEAR, min(misses)) + 1e-9
        population = [judge.judged(start) for start, miss in zip(starts, misses, strict=True) if miss <= most]
        spread, failures = 0.5, 0
        while judge.num_evaluations < config.search_evaluations and failures < MOST_FAILURES:
            population = sorted(population, key=lambda one: one.divergence)[:POPULATION]
            bar.n = judge.num_evaluations
            bar.set_postfix(kl=f"{population[0].divergence:.4f}")
            child = _child(population, structure, config, latency, spread, generator)
            if child is None or judge.knows(child) or _miss(child, structure, config, latency) > most:
                failures += 1  # few plans meet the budget, or all near ones are known: look further
                spread = min(1.5, spread * 1.1)
                continue
            failures = 0
            population.append(judge.judged(child))
            better = population[-1].divergence < population[0].divergence
            spread = min(1.5, spread * 1.5) if better else max(0.05, spread * 0.95)  # one child in about ten is better
    return min(population, key=lambda one: one.divergence)


def _child(
    population: list[Individual],
    structure: Structure,
    config: PruningConfig,
    latency: LatencyTable | None,
    spread: float,
    generator: torch.Generator,
) -> Start | None:
    """A plan near one or two of the population (better ones are likelier parents); `None` if it misses the budget."""

    def draw(number: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        found: np.ndarray[tuple[int], np.dtype[np.float64]] = torch.rand(
            number, generator=generator, dtype=torch.float64
        ).numpy()
        return found

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
        return Start(ladders, nearest_prefix(ladders, sequence, spending, config))
    except BudgetError:
        return None


def _miss(start: Start, structure: Structure, config: PruningConfig, latency: LatencyTable | None) -> float:
    """How far a plan is from the budget, as a fraction of the dense model."""
    spending = spending_of(start.ladders, structure, config, latency)
    return abs(spending.removed(start.taken) / spending.base - config.pruning_ratio)


def _weights(start: Start) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The fractions that a plan removes, half a step more: with these weights the sequence passes through the plan."""
    gone = [len(ladder.removed(steps)) for ladder, steps in zip(start.ladders, start.taken, strict=True)]
    return np.array([(n + 0.5 * x.step) / x.axis.num_units for n, x in zip(gone, start.ladders, strict=True)])


def _swapped(ladder: Ladder, steps: int, draws: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Ladder:
    """A ladder of layers where, every other time, one that goes and one that stays change places."""
    stays = len(ladder.order) - steps
    first = int(ladder.ends[ladder.num_taken - 1]) if ladder.num_taken else 0  # those before went earlier
    if steps <= first or not stays or draws[0] < 0.5:
        return ladder
    order = ladder.order.copy()
    one, other = first + int(draws[1] * (steps - first)), steps + int(draws[2] * stays)
    order[[one, other]] = order[[other, one]]
    return dataclasses.replace(ladder, order=order)


class _Judge:
    """Measures plans on the same windows, each plan once."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        config: PruningConfig,
        windows: list[Tensor],
        preview: Preview | None,
    ) -> None:
        self._model, self._structure, self._config, self._windows = model, structure, config, windows
        self._preview = preview
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], float] = {}
        self._dense = [_log_probs(self._logits(ids)) for ids in windows]

    @property
    def num_evaluations(self) -> int:
        return len(self._known)

    def knows(self, start: Start) -> bool:
        return tuple(sorted(self._kept(start).items())) in self._known

    def judged(self, start: Start) -> Individual:
        kept = self._kept(start)
        key = tuple(sorted(kept.items()))
        if key not in self._known:
            plan = make_plan(self._structure, kept, self._config, None)
            repaired = contextlib.nullcontext() if self._preview is None else self._preview(plan)
            with repaired, masked(self._model, self._structure, plan):
                total = sum(
                    _divergence(dense, self._logits(ids)) for dense, ids in zip(self._dense, self._windows, strict=True)
                )
            value = total / sum(ids.numel() for ids in self._windows)
            self._known[key] = math.inf if math.isnan(value) else value
        return Individual(start.ladders, start.taken, self._known[key])

    def _kept(self, start: Start) -> Kept:
        return state_after(start.ladders, start.taken, self._structure, indices=True).kept

    def _logits(self, ids: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=ids.to(input_device(self._model)), use_cache=False).logits
        return logits


def _log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities `[tokens, vocab_size]`, taken in float32 (float64 for float64), in the dtype of the logits."""
    rows = logits.flatten(0, 1)
    for part in torch.split(rows, _rows(rows)):
        part.copy_(part.to(_precision(rows)).log_softmax(-1))
    return rows


def _divergence(dense: Tensor, logits: Tensor) -> float:
    """Sum over the tokens of the KL divergence from the dense log-probabilities `[tokens, vocab_size]`, in nats."""
    rows, total = logits.flatten(0, 1), 0.0
    for ours, theirs in zip(torch.split(rows, _rows(rows)), torch.split(dense, _rows(rows)), strict=True):
        theirs = theirs.to(_precision(rows))
        difference = theirs - ours.to(_precision(rows)).log_softmax(-1)
        total += float((theirs.exp() * difference).sum(dtype=torch.float64))
    return total


def _rows(logits: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // logits.shape[-1])


def _precision(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _windows(batches: Iterable[Batch], number: int) -> list[Tensor]:
    """The first `number` windows, in batches as they come: `input_ids` `[B, T]`."""
    windows: list[Tensor] = []
    for batch in batches:
        ids = checked_ids(batch)[:number]
        windows.append(ids)
        number -= len(ids)
        if number <= 0:
            break
    if not windows:
        raise CalibrationError("allocation 'search' found no batch, expected one or more: give a calibration text.")
    return windows
