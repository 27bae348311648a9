"""Scores + budget → plan: the one decision of a pruning run."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import torch

from hf_prune.allocation.budgets import ratio_too_small, spending_of, unit_costs
from hf_prune.allocation.curves import measured_orders
from hf_prune.allocation.ladders import make_ladders, state_after
from hf_prune.allocation.search import Candidate, search
from hf_prune.allocation.sequences import (
    Share,
    by_fraction,
    by_score,
    check_reach,
    nearest_prefix,
    shares_of_mapping,
    units_of_axis,
)
from hf_prune.allocation.spectral import hill_exponents, spectral_weights
from hf_prune.config import PruningConfig, axes_of_kind, selected_axes
from hf_prune.errors import BudgetError, CalibrationError, ConfigError
from hf_prune.memory import count_memory, memory_of
from hf_prune.plan import PruningPlan, make_plan
from hf_prune.scores import check_scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor, nn

    from hf_prune.allocation.ladders import RemovalOrder
    from hf_prune.allocation.search import Preview
    from hf_prune.latency import LatencyTable
    from hf_prune.layers.walk import Batch, LayerProtocol
    from hf_prune.layers.work import WorkDir
    from hf_prune.structure.axes import Structure

logger = logging.getLogger(__name__)


def allocate(
    scores: Mapping[str, Tensor],
    structure: Structure,
    config: PruningConfig,
    *,
    model: nn.Module | None = None,
    batches: Iterable[Batch] | None = None,
    latency: LatencyTable | None = None,
    exponents: Mapping[int, float] | None = None,
    preview: Preview | None = None,
    work: WorkDir | None = None,
    gone: PruningPlan | None = None,
    protocol: LayerProtocol | None = None,
    base_model_name_or_path: str | None = None,
) -> PruningPlan:
    """Decide which units stay.

    Inside an axis the units with the lowest scores go first (ties: lower index first), `round_to` at a time.

    `uniform`: all axes lose the same fraction of their units, rounded down to whole steps; a step is taken in all
    layers at once, unless it is worth more than 1 % of the budget, then layers with lower scores go first (ties: lower
    layer first). `global`: steps compete across axes by score per parameter removed (per predicted second for the
    budget `latency`), or by standardised score. A mapping: fractions in proportion to its weights; a kind is one pool,
    in which units compete as in `global`. `spectral`: fractions in proportion to `spectral_weights` of the layers.
    `curves`: as `global` with `measured_orders`, whatever `standardise` says.
    `search`: widths with the least KL divergence from the dense model, from the better of the uniform, the global and
    the spectral plan on. Attention of layer 0 stays (caches are measured by it).

    Args:
        scores: float `[num_units]` for every axis of `selected_axes(structure, config)`, higher = keep.
        structure: structure of the dense model.
        config: ratio, budget and limits.
        model: the dense model, for `spectral`, `curves` and `search`; not changed.
        batches: calibration batches (`input_ids` `[B, T]`), for `curves` and `search`.
        latency: table of measured latencies, for the budget `latency`; otherwise only recorded.
        exponents: decoder layer → Hill exponent, if already known; saves `spectral` and `search` the spectra.
        preview: for `curves` and `search` of plans that will be repaired: see `search`.
        work: for `curves` and `search`: keeps what was measured.
        gone: a plan of the same axes and a smaller ratio, all of whose units go (see `steps`); they count for the
            ratio, their scores for the statistics of their axis only.
        protocol: for `curves` and `search`: how the model runs its layers, if that is known.
        base_model_name_or_path: recorded in the plan.

    Returns:
        The plan whose achieved ratio is nearest to the asked one. With a `latency` table it also records the predicted
        fraction of a request's time removed.

    Raises:
        ScoreError: scores are missing, of the wrong shape, or not finite.
        StructureError: the model lacks a kind of axis asked for, or none of that kind can be pruned.
        ConfigError: `layers`, `protect` or the mapping name what the model does not have; or the model, or the latency
            table, is needed and missing.
        CalibrationError: `curves` or `search` without batches.
        PlanError: the latency table was measured on another model, or `gone` made for another.
        BudgetError: the ratio is out of reach, or so small that no unit would be removed.
    """
    _check_inputs(config, model, batches, exponents)
    if gone is not None:
        gone.check(structure)
    checked = check_scores(scores, structure, config)
    _warn_blocked(structure, config)
    costs = unit_costs(structure, [structure.axes[name] for name in checked], config, latency)
    ladders = make_ladders(checked, costs, structure, config, gone)
    _check_any(ladders, config)
    if exponents is None and model is not None and config.allocation in ("spectral", "search"):
        exponents = hill_exponents(model, structure)
    if config.allocation == "curves":
        assert model is not None
        assert batches is not None
        ladders = measured_orders(ladders, model, structure, config, batches, preview, work, protocol)
    if config.allocation == "search":
        assert model is not None
        assert batches is not None
        start: Candidate = search(
            model,
            structure,
            config,
            _starts(ladders, structure, config, latency, exponents or {}),
            batches,
            latency,
            preview,
            work,
            protocol,
        )
    else:
        start = _start(ladders, structure, config, latency, exponents or {})
    kept = state_after(start.ladders, start.taken, structure, indices=True).kept
    plan = make_plan(structure, kept, config, base_model_name_or_path)
    if config.budget == "memory":
        whole, less = count_memory(structure, config).total, memory_of(plan, structure).total
        plan = dataclasses.replace(plan, achieved=plan.achieved | {"memory": (whole - less) / whole})
    if latency is None or any(structure.axes[name].kind == "hidden" or structure.axes[name].is_inner for name in kept):
        return plan
    dense, pruned = latency.predict({}).total_s, latency.predict_plan(plan).total_s
    return dataclasses.replace(plan, achieved=plan.achieved | {"latency": (dense - pruned) / dense if dense else 0.0})


def check_ratio(structure: Structure, config: PruningConfig, latency: LatencyTable | None = None) -> None:
    """Raise `BudgetError` if no scores let `allocate` reach the ratio or remove anything: before anything is scored."""
    axes = selected_axes(structure, config)
    scores = {axis.name: torch.ones(axis.num_units) for axis in axes}
    ladders = make_ladders(scores, unit_costs(structure, axes, config, latency), structure, config)
    _check_any(ladders, config)
    if isinstance(config.allocation, str) and config.budget != "units":  # these have limits for each axis
        check_reach(ladders, spending_of(ladders, structure, config, latency), config)


def _check_any(ladders: list[RemovalOrder], config: PruningConfig) -> None:
    if not any(len(ladder.step_ends) for ladder in ladders):
        raise ratio_too_small(config, "round_to, min_units, layers and protect leave no unit that may go")


def _start(
    ladders: list[RemovalOrder],
    structure: Structure,
    config: PruningConfig,
    latency: LatencyTable | None,
    exponents: Mapping[int, float],
) -> Candidate:
    """The plan of one allocation without search."""
    shares = [Share(1.0) for _ in ladders]
    if config.allocation == "uniform" and config.budget == "units":
        taken = [units_of_axis(ladder, config) for ladder in ladders]
        if not any(taken):
            raise ratio_too_small(config, "on every axis the nearest step is none at all")
        return Candidate(ladders, taken)
    if isinstance(config.allocation, tuple):
        shares = shares_of_mapping(ladders, structure, config)
        ladders = [x if share.weight else x.without_steps() for x, share in zip(ladders, shares, strict=True)]
        if not any(len(ladder.step_ends) for ladder in ladders):
            raise ratio_too_small(config, "the mapping leaves no unit that may go")
    elif config.allocation == "spectral":
        weights = spectral_weights(exponents, config.spectral_epsilon)
        shares = [Share(1.0 if x.axis.layer is None else weights[x.axis.layer]) for x in ladders]
    spending = spending_of(ladders, structure, config, latency)
    if config.allocation in ("global", "curves"):
        sequence = by_score(ladders, config.standardise if config.allocation == "global" else "none")
    else:
        sequence = by_fraction(ladders, shares, spending, config)
    return Candidate(ladders, nearest_prefix(ladders, sequence, spending, config))


def _starts(
    ladders: list[RemovalOrder],
    structure: Structure,
    config: PruningConfig,
    latency: LatencyTable | None,
    exponents: Mapping[int, float],
) -> list[Candidate]:
    """Plans that a search starts from: those of the other allocations that meet the budget."""
    starts, errors = [], []
    equal = config.target.uniform & set(config.axes)
    for name in ("uniform", "global") if equal else ("uniform", "global", "spectral"):
        try:
            own = dataclasses.replace(config, allocation=name)
            starts.append(_start(ladders, structure, own, latency, exponents))
        except BudgetError as error:
            errors.append(error)
    if not starts:
        raise errors[0]
    return starts


def _check_inputs(
    config: PruningConfig,
    model: nn.Module | None,
    batches: Iterable[Batch] | None,
    exponents: Mapping[int, float] | None,
) -> None:
    if config.compares_outputs and batches is None:
        raise CalibrationError(
            f"allocation {config.allocation!r} needs calibration batches and found none: give a calibration text."
        )
    missing = model is None and (config.compares_outputs or (config.allocation == "spectral" and exponents is None))
    if missing:
        raise ConfigError(f"allocation {config.allocation!r} looks at the weights: pass the dense `model` to allocate.")


def _warn_blocked(structure: Structure, config: PruningConfig) -> None:
    for kind in config.axes:
        for axis in axes_of_kind(structure, kind):
            if not axis.prunable:
                logger.warning("%s stays whole: %s", axis.name, axis.blocker or f"it has {axis.num_units} unit")
