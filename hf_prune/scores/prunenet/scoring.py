"""From a policy to scores: its order of the units, and what the reward says each is worth."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from hf_prune.config import PruneNetConfig, PruningConfig, selected_axes
from hf_prune.errors import ConfigError, ScoreError
from hf_prune.layers.processes import main_writes
from hf_prune.layers.statistics import solving
from hf_prune.layers.weights import read_weight
from hf_prune.scores.prunenet.layer_importance import layer_importance
from hf_prune.scores.prunenet.policy import Policy, sample
from hf_prune.scores.prunenet.spectra import Spectrum
from hf_prune.scores.prunenet.training import features_of, train
from hf_prune.scores.prunenet.unit_matrix import UnitMatrix, unit_matrix

if TYPE_CHECKING:
    from hf_prune.layers.walk import Walk
    from hf_prune.structure.axes import Axis, Structure

NUM_KNOTS = 32


def prunenet_scores(
    walk: Walk, structure: Structure, config: PruningConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Scores of a policy: float32 `[num_units]` per selected axis, on the CPU; higher = keep.

    With `allocation="uniform"` they are the policy's logits. Otherwise units go in the order of the logits, and a
    unit's score is what the layer's reward loses with it (along the lower convex hull of the loss over the number of
    removed units), times the layer's weight: scores of all layers compare, so that the reward decides how much each
    loses.

    Weights are read one layer at a time; the model runs only for `layer_weight="update"`.

    Raises:
        CheckpointError: the saved policy is missing or damaged.
        ConfigError: the saved policy does not fit `config` or this model.
        ScoreError: weights are not finite.
    """
    assert isinstance(config, PruneNetConfig)
    job = _Job(walk, structure, config, generator)
    policy = _loaded(config) if config.policy is not None else job.train()
    if config.save_policy is not None:
        with main_writes(f"policy {config.save_policy}") as mine:
            if mine:
                policy.save(config.save_policy)
    scores = {}
    for axis in job.axes:
        with solving(axis.name):
            scores[axis.name] = job.scores(policy, axis)
    return scores


def train_policy(walk: Walk, structure: Structure, config: PruneNetConfig, generator: torch.Generator) -> Policy:
    """Train a policy on a model's weights, without scoring. Arguments as for `prunenet_scores`."""
    return _Job(walk, structure, config, generator).train()


class _Job:
    """One model, its selected axes, and what their layers count."""

    def __init__(self, walk: Walk, structure: Structure, config: PruneNetConfig, generator: torch.Generator) -> None:
        self.walk, self.structure, self.config, self.generator = walk, structure, config, generator
        self.axes = selected_axes(structure, config)
        if any(axis.branch is None for axis in self.axes):
            raise ConfigError(f"axes: found {config.axes}; 'prunenet' scores rows of MLP and attention axes only.")
        last = max(len(structure.layer_paths) - 1, 1)
        self.depths = {axis.name: (axis.layer or 0) / last for axis in self.axes}
        tokens = torch.Generator().manual_seed(config.seed)
        updates: dict[str, float] = {}
        if config.layer_weight == "update":
            updates = layer_importance(walk, structure, self.axes, tokens)
        self.weights = {
            axis.name: updates.get(axis.name, 1.0) * config.discount ** (axis.layer or 0) for axis in self.axes
        }

    def rows(self, name: str) -> UnitMatrix:
        return unit_matrix(
            partial(read_weight, self.walk.model), self.structure, self.structure.axes[name], self.config.state
        )

    def train(self) -> Policy:
        ratio = self.config.train_ratio or units_ratio(self.structure, self.config, self.axes)
        return train(self.rows, self.depths, self.weights, self.config, ratio, self.generator)

    def scores(self, policy: Policy, axis: Axis) -> Tensor:
        rows = self.rows(axis.name)
        with torch.no_grad():
            logits = policy.logits(features_of(rows, policy.features, self.depths[axis.name]))
        if not bool(logits.isfinite().all()):
            raise ScoreError(f"{axis.name}: the policy gives logits that are not finite; train another.")
        order = logits.argsort(descending=True, stable=True)
        if self.config.sampled:
            order = sample(logits, 1, self.generator)[0]
        if self.config.allocation == "uniform":
            ranks = torch.empty(len(order))
            ranks[order] = torch.arange(len(order), 0, -1, dtype=torch.float32)
            return ranks if self.config.sampled else logits
        spectrum = Spectrum(rows.state, self.config.distance, self.config.exact_up_to)
        return self.weights[axis.name] * marginal_losses(spectrum, order)


def units_ratio(structure: Structure, config: PruningConfig, axes: list[Axis]) -> float:
    """Fraction of units that goes from the axes on average if `config` is met, 0.05 to 0.95."""
    if config.budget == "units":
        return min(max(config.pruning_ratio, 0.05), 0.95)
    names = {axis.name: 0 for axis in axes}
    budget: Literal["decoder", "model"] = "model" if config.budget == "model" else "decoder"
    whole = structure.num_parameters(budget=budget)
    reachable = whole - structure.num_parameters(names, budget)
    return min(max(config.pruning_ratio * whole / max(reachable, 1), 0.05), 0.95)


def marginal_losses(spectrum: Spectrum, order: Tensor) -> Tensor:
    """What the spectral loss grows by with each unit, when units go from the last of `order` to the first.

    The loss is evaluated at up to `NUM_KNOTS` counts; slopes are those of its lower convex hull, so that they rise,
    interpolated between the hull's edges. Strictly rising along the removal order.

    Returns:
        float32 `[U]`.
    """
    num_units = len(order)
    counts = np.unique(np.linspace(0, num_units, min(NUM_KNOTS, num_units) + 1).round().astype(int))
    losses = np.empty(len(counts))
    for at, removed in enumerate(counts):
        mask = torch.zeros(1, num_units, dtype=torch.bool)
        mask[0, order[: num_units - removed]] = True
        losses[at] = 0.0 if removed == 0 else float(spectrum.losses(mask)[0])
    hull = _lower_hull(counts, np.maximum.accumulate(losses))
    x, y = counts[hull], np.maximum.accumulate(losses)[hull]
    slopes, middles = np.diff(y) / np.diff(x), (x[1:] + x[:-1]) / 2
    places = np.arange(num_units) + 0.5
    values = np.interp(places, middles, slopes)
    # equal slopes must not lose the order to rounding
    values = values * (1 + 1e-6 * np.arange(num_units)) + slopes.max() * 1e-9 * np.arange(num_units)
    scores = torch.empty(num_units)
    scores[order.flip(0)] = torch.from_numpy(values).float()
    return scores


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of points with rising x (Andrew's monotone chain)."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _loaded(config: PruneNetConfig) -> Policy:
    assert config.policy is not None
    policy = Policy.load(config.policy)
    for name in ("features", "state"):
        if getattr(policy, name) != getattr(config, name):
            raise ConfigError(
                f"the policy in {config.policy} was trained with {name}={getattr(policy, name)!r}, the configuration "
                f"asks for {getattr(config, name)!r}. Ask for the same, or train a policy."
            )
    return policy
