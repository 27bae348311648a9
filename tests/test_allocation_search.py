"""Search over widths: it finds the best plan where all can be enumerated, and never does worse than its starts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import SETTINGS, shared_model, shared_structure, tiny_model, token_ids
from structures import llama
from test_allocation import latency_table, random_scores

from hf_prune import MagnitudeConfig, RandomConfig, WandaConfig, allocate, infer_structure, prune
from hf_prune.allocation.curves import _worth
from hf_prune.allocation.search import Evaluator
from hf_prune.config import PruningConfig, selected_axes
from hf_prune.errors import BudgetError, CalibrationError, ConfigError
from hf_prune.layers.masking import masked
from hf_prune.layers.price import LEVELS
from hf_prune.layers.walk import Walk
from hf_prune.layers.work import WorkDir
from hf_prune.plan import make_plan

BATCHES = [{"input_ids": token_ids(2, 7)}, {"input_ids": token_ids(1, 7, seed=2)}]


@pytest.fixture(scope="module")
def small():
    """A llama with 6 channels in each of 3 MLPs, and its structure."""
    model_type, sizes = SETTINGS["llama"]
    SETTINGS["llama_narrow"] = (model_type, {**sizes, "intermediate_size": 6})
    try:
        model = tiny_model("llama_narrow")
    finally:
        del SETTINGS["llama_narrow"]
    with torch.no_grad():  # layers of very different importance
        for layer, factor in enumerate((0.3, 3.0, 1.0)):
            model.model.layers[layer].mlp.down_proj.weight *= factor
    return model, infer_structure(model)


def divergence(model, structure, plan):
    """Mean KL divergence of the pruned model, from the definition. Masked computes as sliced does (law 2)."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in BATCHES:
            p = model(**batch, use_cache=False).logits.softmax(-1)
            with masked(model, structure, plan):
                q = model(**batch, use_cache=False).logits.softmax(-1)
            total += float((p * (p / q).log()).sum())
            count += batch["input_ids"].numel()
    return total / count


def search_config(**changes):
    settings = {"allocation": "search", "axes": ("mlp",), "budget": "units", "search_evaluations": 400}
    return PruningConfig(**{"pruning_ratio": 0.5} | settings | changes)


@pytest.mark.parametrize(("ratio", "min_units", "seed"), [(0.5, 1, 0), (0.34, 1, 1), (0.34, 3, 2)])
def test_the_best_widths_are_found(small, ratio, min_units, seed):
    model, structure = small
    scores = random_scores(structure, seed)
    config = search_config(pruning_ratio=ratio, min_units=min_units, seed=seed)
    found = allocate(scores, structure, config, model=model, batches=BATCHES)
    gone = 18 - sum(found.widths[f"layers.{layer}.mlp"] for layer in range(3))
    assert gone == round(18 * ratio)
    everything = {}
    for counts in itertools.product(range(7 - min_units), repeat=3):
        if sum(counts) == gone:
            kept = {
                f"layers.{layer}.mlp": tuple(sorted(scores[f"layers.{layer}.mlp"].argsort(stable=True)[n:].tolist()))
                for layer, n in enumerate(counts)
                if n
            }
            everything[counts] = divergence(model, structure, make_plan(structure, kept, config, None))
    assert len(everything) > 6
    assert divergence(model, structure, found) == pytest.approx(min(everything.values()), rel=1e-9)


def test_the_best_layers_are_found():
    model, structure = shared_model("llama"), shared_structure("llama")
    config = search_config(axes=("layer", "layer_mlp"), pruning_ratio=1 / 3)
    scores = random_scores(structure, 3)
    found = allocate(scores, structure, config, model=model, batches=BATCHES)
    plans = []
    for layers, mlps in itertools.product(itertools.combinations(range(3), 2), itertools.combinations(range(3), 2)):
        plans += [{"layers": layers}, {"layers.mlp": mlps}, {"layers.mlp": mlps[:1]}]
        plans += [{"layers": layers, "layers.mlp": mlp} for mlp in [(layer,) for layer in layers]]
    units = [make_plan(structure, kept, config, None) for kept in plans]
    equal = [plan for plan in units if plan.achieved["units"] == found.achieved["units"]]
    assert len({str(plan.kept_indices) for plan in equal}) > 2
    best = min(divergence(model, structure, plan) for plan in equal)
    assert divergence(model, structure, found) <= best * (1 + 1e-9)


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("evaluations", [1, 20])
def test_no_worse_than_the_starts_and_within_the_budget(family, evaluations):
    model, structure = shared_model(family), shared_structure(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    scores = random_scores(structure)
    config = PruningConfig(0.4, allocation="search", search_evaluations=evaluations)
    found = allocate(scores, structure, config, model=model, batches=BATCHES)
    starts = []
    for name in ("uniform", "global", "spectral"):
        plan = allocate(scores, structure, dataclasses.replace(config, allocation=name), model=model)
        starts.append((abs(plan.achieved["decoder"] - 0.4), divergence(model, structure, plan)))
    nearest = max(0.001, min(starts)[0]) + 1e-9
    best = min(value for miss, value in starts if miss <= nearest)
    value = divergence(model, structure, found)
    assert value <= best * (1 + 1e-9)
    assert abs(found.achieved["decoder"] - 0.4) <= nearest  # as exact as the best of the others
    if evaluations == 1:  # nothing but the starts was tried
        assert value == pytest.approx(best, rel=1e-9)
    for axis in selected_axes(structure, config):  # the order of units is that of the scores
        kept = found.kept_indices.get(axis.name, range(axis.num_units))
        gone = set(range(axis.num_units)) - set(kept)
        assert not gone or max(scores[axis.name][list(gone)]) <= min(scores[axis.name][list(kept)])
    assert allocate(scores, structure, config, model=model, batches=BATCHES) == found
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


@pytest.mark.parametrize("allocation", ["search", "curves"])
@pytest.mark.parametrize(
    "changes",
    [
        {"budget": "latency", "axes": ("mlp", "attention")},
        {"budget": "model", "axes": ("mlp", "attention"), "round_to": 8},
        {"protect": ("layers.0.*",), "layers": (0, 2), "min_units": 5},
        {"axes": ("layer_attention", "attention"), "pruning_ratio": 1 / 3},
    ],
)
def test_limits_and_budgets_hold(changes, allocation):
    model, structure = shared_model("llama"), shared_structure("llama")
    config = search_config(**{"pruning_ratio": 0.4, "search_evaluations": 12, "allocation": allocation} | changes)
    table = latency_table(structure) if config.budget == "latency" else None
    plan = allocate(random_scores(structure), structure, config, model=model, batches=BATCHES, latency=table)
    target = config.pruning_ratio if config.protect == () else None
    if target is not None:
        assert plan.achieved[config.budget] == pytest.approx(target, abs=0.06)
    for name, kept in plan.kept_indices.items():
        assert not (config.protect and name.startswith("layers.0"))
        assert config.layers is None or structure.axes[name].layer in config.layers
        assert len(kept) >= config.min_units or structure.axes[name].kind == "layer"
        assert config.round_to is None or structure.axes[name].kind != "mlp" or len(kept) % config.round_to == 0
    assert (0, "attention") not in plan.removed_branches


def test_few_windows_are_looked_at_and_evaluations_are_counted(monkeypatch):
    model, structure = tiny_model("llama"), shared_structure("llama")
    calls = []
    run = Walk._last_hidden
    monkeypatch.setattr(Walk, "_last_hidden", lambda self, ids: (calls.append(ids), run(self, ids))[1])
    config = search_config(search_samples=2, search_evaluations=9)
    allocate(random_scores(structure), structure, config, model=model, batches=BATCHES)
    assert len(calls) == 1 + 9  # the dense model, then nine plans, on the first two windows
    assert all(torch.equal(ids, BATCHES[0]["input_ids"]) for ids in calls)
    calls.clear()
    allocate(random_scores(structure), structure, search_config(search_evaluations=4), model=model, batches=BATCHES)
    assert len(calls) == 2 * (1 + 4)


def test_plans_that_break_the_model_are_not_chosen(small, monkeypatch):
    model, structure = small
    config = search_config(search_evaluations=8, search_samples=2)

    def chosen(values):
        measured = lambda self, plans: [math.inf if math.isnan(x) else x for _, x in zip(plans, values)]  # noqa: E731, B905
        monkeypatch.setattr(sys.modules["hf_prune.allocation.search"].Evaluator, "_divergences", measured)
        return allocate(random_scores(structure), structure, config, model=model, batches=BATCHES)

    nothing = itertools.repeat(float("nan"))
    found = {str(chosen(itertools.chain([float("nan")] * n, [0.5], nothing)).kept_indices) for n in range(8)}
    assert len(found) == 8  # each time the only plan that gives a number


def test_curves_take_first_what_the_model_misses_least():
    """Whatever the scores of an axis are beside those of others."""
    model, structure = tiny_model("llama"), shared_structure("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e-3
    scores = random_scores(structure)
    scores["layers.1.mlp"] *= 1000
    config = search_config(pruning_ratio=0.3, allocation="curves")
    plan = allocate(scores, structure, config, model=model, batches=BATCHES)
    assert list(plan.kept_indices) == ["layers.1.mlp"]
    best = scores["layers.1.mlp"].topk(plan.widths["layers.1.mlp"]).indices.sort().values
    assert plan.kept_indices["layers.1.mlp"] == tuple(best.tolist())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_a_plan_begins_where_it_changes_something(family, monkeypatch):
    """Run from the dense model's hidden states there, it loses what it loses when run as a whole; and runs no more."""
    model, structure = shared_model(family), shared_structure(family)
    depth = ("layer",) if "layers" in structure.axes else ()
    config = search_config(axes=("mlp", "attention", *depth), search_samples=3)
    axes = selected_axes(structure, config)
    plans = [make_plan(structure, {axis.name: tuple(range(1, axis.num_units))}, config, None) for axis in axes]
    both = plans[-1 - len(depth)].kept_indices | plans[-2 - len(depth)].kept_indices
    plans += [make_plan(structure, both, config, None), make_plan(structure, {}, config, None)]
    ran = []
    run = Walk.run
    monkeypatch.setattr(Walk, "run", lambda self, layer, *args: (ran.append(layer), run(self, layer, *args))[1])
    found = {}
    with torch.no_grad():
        for boundaries in (False, True):
            evaluator = Evaluator(model, structure, config, BATCHES, None, None, None, boundaries=boundaries)
            ran.clear()
            found[boundaries] = evaluator._divergences(plans)
    assert found[True] == found[False]
    assert min(found[True][:-1]) > 0
    assert found[True][-1] == pytest.approx(0, abs=1e-7)
    number = len(structure.layer_paths)  # each axis from its layer on, and the last axes together
    after = [number - (axis.layer or 0) for axis in axes] + [max(number - structure.axes[name].layer for name in both)]
    assert len(ran) == len(BATCHES) * sum(after)


def test_curves_are_nested_and_measured_once(tmp_path, monkeypatch):
    model, structure = shared_model("llama"), shared_structure("llama")
    scores, measured = random_scores(structure), []
    evaluator = sys.modules["hf_prune.allocation.search"].Evaluator
    run = evaluator._divergences
    monkeypatch.setattr(
        evaluator, "_divergences", lambda self, plans: (measured.append(len(plans)), run(self, plans))[1]
    )
    work, kept = WorkDir(tmp_path / "work"), {}
    for ratio, budget in ((0.2, "decoder"), (0.4, "decoder"), (0.6, "units")):
        config = PruningConfig(ratio, allocation="curves", budget=budget)
        plan = allocate(scores, structure, config, model=model, batches=BATCHES, work=work)
        assert plan.achieved[budget] == pytest.approx(ratio, abs=0.03)
        kept[ratio] = plan.kept_indices
    assert sum(measured) <= 1 + LEVELS * len(selected_axes(structure, config))
    for name, units in kept[0.2].items():
        assert set(kept[0.4][name]) <= set(units)


@given(st.lists(st.floats(0, 10), min_size=2, max_size=9), st.integers(1, 3))
def test_worth_of_steps_is_the_slope_of_the_hull(losses, step):
    """It never falls along the steps, and is that of a straight line where the curve is one, or bends down."""
    ends = step * np.arange(1, len(losses))
    ladder = SimpleNamespace(num_taken=0, step_ends=ends, scores=None)
    levels = range(1, len(losses))
    worth = _worth(ladder, levels, losses)
    assert (np.diff(worth) >= -1e-9).all()
    straight = _worth(ladder, levels, [2.0 * units for units in (0, *ends)])
    np.testing.assert_allclose(straight, 2.0 * step)
    if len(losses) > 2:
        bent = _worth(ladder, levels, [0.0, *([5.0] * (len(losses) - 1))])
        np.testing.assert_allclose(bent, 5.0 / ends[-1] * step)


@pytest.mark.parametrize("allocation", ["search", "curves"])
def test_search_through_prune(allocation):
    model = shared_model("llama")
    repair = "least_squares" if allocation == "curves" else "none"
    config = MagnitudeConfig(0.3, allocation=allocation, search_evaluations=6, num_steps=2, repair=repair)
    result = prune(model, config, calibration=BATCHES)
    assert result.plan.achieved["decoder"] == pytest.approx(0.3, abs=0.03)
    wanda = WandaConfig(0.3, allocation="search", search_evaluations=6)
    assert prune(model, wanda, calibration=BATCHES).plan.config == wanda
    with pytest.raises(CalibrationError, match="allocation 'search' needs calibration text"):
        prune(model, RandomConfig(0.3, allocation="search"))


def test_search_errors():
    model, structure = shared_model("llama"), shared_structure("llama")
    scores = random_scores(structure)
    with pytest.raises(CalibrationError, match="allocation 'search' needs calibration batches and found none"):
        allocate(scores, structure, search_config(), model=model)
    with pytest.raises(CalibrationError, match="found no batch"):
        allocate(scores, structure, search_config(), model=model, batches=[])
    padded = {"input_ids": token_ids(), "attention_mask": torch.zeros(2, 9)}
    with pytest.raises(CalibrationError, match="holds padding"):
        allocate(scores, structure, search_config(), model=model, batches=[padded])
    with pytest.raises(ConfigError, match="looks at the weights: pass the dense `model`"):
        allocate(random_scores(llama()), llama(), search_config(), batches=BATCHES)
    with pytest.raises(ConfigError, match="hidden axis cannot be masked"):
        allocate(scores, structure, search_config(axes=("hidden",)), model=model, batches=BATCHES)
    with pytest.raises(BudgetError, match="out of reach"):
        allocate(scores, structure, search_config(pruning_ratio=0.9, min_units=20), model=model, batches=BATCHES)
    for name in ("search_evaluations", "search_samples"):
        with pytest.raises(ConfigError, match=rf"{name}: found 0, expected a whole number from 1"):
            PruningConfig(0.3, **{name: 0})
