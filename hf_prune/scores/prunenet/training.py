"""Train a policy by REINFORCE on spectral rewards, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_prune.errors import ScoreError
from hf_prune.layers.statistics import solving
from hf_prune.scores.prunenet.policy import (
    NORM_FEATURE,
    Policy,
    log_probability,
    row_features,
    sample,
    scale_free_features,
)
from hf_prune.scores.prunenet.spectra import Spectrum
from hf_prune.scores.prunenet.unit_matrix import UnitMatrix

if TYPE_CHECKING:
    from hf_prune.config import PruneNetConfig

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 * 2**20
"""Layers are kept in memory between episodes up to this size in all, and read again above."""

START_SHARPNESS = 5.0
"""Logit of one standard deviation of the log norms at the start: above the noise of a sample (about 1), so that most
units that change places are near the boundary, but with samples that can leave a start that is bad."""

ReadRows = Callable[[str], UnitMatrix]


@dataclass
class _Layer:
    """What is kept of a layer between episodes."""

    name: str
    depth: float
    weight: float
    spectrum: Spectrum | None = None
    features: Tensor | None = None


def features_of(rows: UnitMatrix, kind: str, depth: float) -> Tensor:
    """Features of the units of one layer, `[U, num_features]`."""
    return scale_free_features(rows, depth) if kind == "scale_free" else row_features(rows)


def train(
    read_rows: ReadRows,
    depths: Mapping[str, float],
    weights: Mapping[str, float],
    config: PruneNetConfig,
    ratio: float,
    generator: torch.Generator,
) -> Policy:
    """Learn a policy whose kept rows leave the spectra of the layers as they are.

    In each episode every layer gives `num_rollouts` masks; the reward of a mask is minus its spectral distance. The
    gradient is Σ (reward − mean reward of the other rollouts of this layer) · ∇ log p (leave-one-out baseline, Kool et
    al. 2019), with the true Plackett–Luce probability of the mask's order. Advantages are divided by their standard
    deviation, weighed by γ^layer, and clipped gradients go to Adam. The weights with the best deterministic reward over
    all layers are kept, the start included: with `start="row_norm"` the weighted mean reward at `ratio` is never below
    that of keeping the rows of the largest norms.

    Args:
        read_rows: gives the rows of an axis; called again in each episode for what does not fit `CACHE_BYTES`.
        depths: axis name → 0 (first layer) to 1 (last), in layer order.
        weights: axis name → what its reward counts in the mean that picks the best weights.
        config: state, distance, features, start, episodes, rollouts, learning rate, discount.
        ratio: fraction of units removed from each axis.
        generator: source of all randomness.

    Returns:
        The policy, with its learning curve.

    Raises:
        ScoreError: the policy has no finite logits.
    """
    layers = [_Layer(name, depths[name], weights[name]) for name in depths]
    policy: Policy | None = None
    best: tuple[float, Tensor] | None = None
    history: list[dict[str, float]] = []
    optimizer: torch.optim.Optimizer | None = None
    for _ in tqdm(range(config.num_episodes + 1), desc="policy training", unit="episode", leave=False):
        sampled: list[float] = []
        found: list[float] = []
        before: Tensor | None = None
        for position, layer in enumerate(layers):
            with solving(layer.name):
                spectrum, features = _read(layer, layers, read_rows, config)
                if policy is None:
                    weight = _first_weight(features.shape[1], config.start)
                    policy = Policy(weight, torch.zeros(()), config.features, config.state, [], config.to_dict())
                    optimizer = torch.optim.Adam([weight], lr=config.learning_rate)
                if before is None:
                    before = policy.weight.detach().clone()
                assert optimizer is not None
                count = kept_count(len(features), ratio)
                with torch.no_grad():
                    fixed = features @ before
                    found.append(
                        -float(spectrum.losses(_masks(fixed.argsort(descending=True, stable=True)[None], count))[0])
                    )
                rewards = _step(
                    policy, optimizer, spectrum, features, count, config.discount**position, config, generator
                )
                sampled.append(float(rewards.mean()))
        total = sum(layer.weight for layer in layers) or 1.0
        score = sum(layer.weight * reward for layer, reward in zip(layers, found, strict=True)) / total
        history.append({"sampled": sum(sampled) / len(sampled), "best": sum(found) / len(found), "weighted": score})
        assert before is not None
        if best is None or score > best[0]:
            best = (score, before)
    assert policy is not None
    assert best is not None
    if not bool(best[1].isfinite().all()):
        raise ScoreError("the policy's weights are not finite after training; lower the learning_rate.")
    logger.info("policy trained: mean reward %.4f → %.4f", history[0]["best"], max(row["best"] for row in history))
    return Policy(best[1], torch.zeros(()), config.features, config.state, history, config.to_dict())


def _first_weight(num_features: int, start: str) -> Tensor:
    """Zero, or what ranks units by the norms of their rows."""
    weight = torch.zeros(num_features)
    if start == "row_norm":
        weight[NORM_FEATURE] = START_SHARPNESS
    return weight.requires_grad_()


def kept_count(num_units: int, ratio: float) -> int:
    """Units of an axis that stay while training: 1 to all but one."""
    return min(max(round(num_units * (1 - ratio)), 1), num_units - 1)


def _step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    spectrum: Spectrum,
    features: Tensor,
    count: int,
    discount: float,
    config: PruneNetConfig,
    generator: torch.Generator,
) -> Tensor:
    """One update from the rollouts of one layer; returns their rewards."""
    logits = policy.logits(features)
    orders = sample(logits, config.num_rollouts, generator)
    rewards = -spectrum.losses(_masks(orders, count))
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    advantages = rewards - others
    advantages = advantages / advantages.std(correction=0).clamp_min(1e-12)
    loss = -discount * (advantages.float() * log_probability(logits, orders, count)).mean() / count
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([policy.weight], 1.0)
    optimizer.step()
    return rewards


def _masks(orders: Tensor, count: int) -> Tensor:
    """Bool `[N, U]`: the first `count` of each order stay."""
    masks = torch.zeros(orders.shape, dtype=torch.bool)
    return masks.scatter_(1, orders[:, :count], True)


def _read(
    layer: _Layer, layers: Sequence[_Layer], read_rows: ReadRows, config: PruneNetConfig
) -> tuple[Spectrum, Tensor]:
    """Spectrum and features of a layer: kept from the last episode if they fit, otherwise read again."""
    if layer.spectrum is not None and layer.features is not None:
        return layer.spectrum, layer.features
    rows = read_rows(layer.name)
    spectrum = Spectrum(rows.state, config.distance, config.exact_up_to)
    features = layer.features
    if features is None:
        features = features_of(rows, config.features, layer.depth)
    if config.features == "scale_free" or 4 * features.numel() * len(layers) <= CACHE_BYTES:
        layer.features = features
    if spectrum.num_bytes * len(layers) <= CACHE_BYTES:
        layer.spectrum = spectrum
    return spectrum, features
