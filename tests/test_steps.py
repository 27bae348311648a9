"""Steps, by `num_steps` or while training, do not matter where scores do not change; what is gone stays gone."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import shared_model, shared_structure, tiny_model, token_ids
from structures import llama
from test_allocation import cases, kept_sets, latency_table, random_scores, ratios

from hf_prune import LLMPrunerConfig, MagnitudeConfig, OBSConfig, PruningConfig, RandomConfig, WandaConfig, prune
from hf_prune.allocation import allocate
from hf_prune.allocation.steps import for_pruned, gone_units, in_dense_numbering, next_plan
from hf_prune.config import selected_axes
from hf_prune.errors import BudgetError, ConfigError, PlanError, StructureError
from hf_prune.recovery.gradual import ratio_at
from hf_prune.scores import score
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

BATCHES = [{"input_ids": token_ids()}]
SCHEDULES = ("linear", "cubic")
ALLOCATIONS = ("uniform", "global", "spectral", {"mlp": 2, "attention": 1, "*": 0.7}, {"*": 1.0})
AXES = (("mlp",), ("attention", "mlp"), ("layer", "mlp"), ("layer_attention", "layer_mlp", "mlp"))


def exponents(structure):
    return {layer: 2 + layer % 3 for layer in range(len(structure.layer_paths))}


def planned(structure, latency=None):
    return partial(allocate, structure=structure, latency=latency, exponents=exponents(structure))


def stepped(structure, config, scores, at, latency=None):
    """The last plan of steps at these ratios, the same scores at each; gone entries are NaN."""
    stage = None

    def score_of(done):
        found = {name: values.clone() for name, values in scores.items()}
        for name in found if done is not None else ():
            found[name][gone_units(done, name)] = torch.nan
        return found

    for ratio in at:
        stage = next_plan(planned(structure, latency), config, score_of, stage, ratio)
    return stage.plan


def at_once(structure, config, scores, latency=None):
    return allocate(scores, structure, config, latency=latency, exponents=exponents(structure))


@settings(max_examples=200, deadline=None)
@given(cases(), ratios, st.integers(2, 6), st.sampled_from(SCHEDULES))
def test_steps_do_not_matter_where_scores_do_not_change(case, ratio, num_steps, schedule):
    structure, scores, settings_ = case
    config = PruningConfig(ratio, **settings_)
    latency = latency_table(structure) if config.budget == "latency" else None
    try:
        expected = at_once(structure, config, scores, latency)
    except (BudgetError, ConfigError):
        assume(False)
    at = [
        ratio_at(step, begin_step=0, end_step=num_steps, pruning_ratio=ratio, schedule=schedule)
        for step in range(1, num_steps + 1)
    ]
    assert stepped(structure, config, scores, at, latency) == expected


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "gemma3_text", "falcon", "gpt_neox", "mixtral")),
    ],
)
def test_nor_do_they_on_real_structures(family):
    structure = shared_structure(family)
    generator = torch.Generator().manual_seed(0)
    scores = {}
    for i, axis in enumerate(structure.axes.values()):  # axes and units differ by orders of magnitude
        scores[axis.name] = torch.rand(axis.num_units, generator=generator).pow(4) * 10.0 ** (i % 5 - 2)
    tried = 0
    for axes, allocation, budget, standardise in itertools.product(
        AXES, ALLOCATIONS, ("decoder", "model", "units"), ("none", "sum", "mean", "zscore")
    ):
        config = PruningConfig(0.4, axes=axes, allocation=allocation, budget=budget, standardise=standardise)
        try:
            expected = at_once(structure, config, scores)
        except (BudgetError, ConfigError, StructureError):
            continue  # so few units allow less; of some families no branch can be left out
        tried += 1
        for at in ([0.05, 0.4], [0.1, 0.2, 0.3, 0.4], [0.2, 0.2, 0.38, 0.4]):
            assert stepped(structure, config, scores, at) == expected
    assert tried > 60


@settings(max_examples=200, deadline=None)
@given(cases(), ratios, st.integers(0, 99))
def test_what_is_gone_stays_gone_whatever_the_scores(case, ratio, seed):
    structure, _, settings_ = case
    config = PruningConfig(ratio, **settings_)
    latency = latency_table(structure) if config.budget == "latency" else None
    stage, plans = None, []
    for step in (1, 2, 3, 4):
        fresh = random_scores(structure, seed + step)
        try:
            known = planned(structure, latency)
            stage = next_plan(known, config, lambda done, fresh=fresh: fresh, stage, ratio * (step / 4))
        except (BudgetError, ConfigError):
            assume(False)
        if stage is not None:
            plans.append(stage.plan)
    for before, after in itertools.pairwise(map(kept_sets, plans)):
        assert all(after[name] <= before[name] for name in before)
    plan = plans[-1]
    for axis in selected_axes(structure, config):
        if axis.name in plan.kept_indices:
            assert len(plan.kept_indices[axis.name]) >= min(config.min_units, axis.num_units)
    assert plan.config == config


def test_scores_of_what_is_left_compete_whatever_went_before():
    """A unit that went with a high score does not lift those that are left on its axis."""
    structure = llama(num_layers=2, mlp=8)
    names = ("layers.0.mlp", "layers.1.mlp")
    config = PruningConfig(0.5, axes=("mlp",), allocation="global", budget="units")
    first = {name: torch.arange(8.0) + offset for name, offset in zip(names, (1000, 2000), strict=True)}
    second = {name: torch.arange(8.0) + offset for name, offset in zip(names, (0, 50), strict=True)}
    stage = next_plan(planned(structure), config, lambda done: first, None, 0.25)
    assert stage.plan.kept_indices == {"layers.0.mlp": (4, 5, 6, 7)}
    stage = next_plan(
        planned(structure), dataclasses.replace(config, pruning_ratio=0.4375), lambda done: second, stage, 0.4375
    )
    assert stage.plan.kept_indices == {"layers.0.mlp": (7,)}
    assert stage.scores["layers.0.mlp"].tolist() == [1000, 1001, 1002, 1003, 4, 5, 6, 7]


def test_a_plan_of_another_model_is_refused():
    config = PruningConfig(0.3, axes=("mlp",), budget="units")
    plan = allocate(random_scores(llama(mlp=8)), llama(mlp=8), config)
    with pytest.raises(PlanError, match="8 units"):
        allocate(random_scores(llama(mlp=16)), llama(mlp=16), config, gone=plan)


def test_searched_plans_keep_what_is_gone_gone():
    model, structure = shared_model("llama"), shared_structure("llama")
    axes = ("mlp", "layer_mlp", "attention")
    config = MagnitudeConfig(0.5, axes=axes, allocation="search", search_evaluations=12)
    scores = random_scores(structure)
    start = allocate(scores, structure, dataclasses.replace(config, pruning_ratio=0.25, allocation="global"))
    other = random_scores(structure, seed=5)
    plan = allocate(other, structure, config, model=model, batches=BATCHES, gone=start)
    assert all(kept_sets(plan)[name] <= kept for name, kept in kept_sets(start).items())
    assert plan.achieved["decoder"] == pytest.approx(0.5, abs=0.05)


# --- num_steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma3_text"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "spectral", {"mlp": 1}])
@pytest.mark.parametrize("standardise", ["sum", "zscore"])
def test_a_units_own_norm_stays_when_others_of_its_layer_go(name, allocation, standardise):
    config = MagnitudeConfig(0.3, axes=("mlp",), allocation=allocation, standardise=standardise)
    once, twice = (prune(shared_model(name), dataclasses.replace(config, num_steps=n)).plan for n in (1, 4))
    assert twice.kept_indices == once.kept_indices
    assert twice.achieved == once.achieved


METHODS = (MagnitudeConfig, RandomConfig, WandaConfig, LLMPrunerConfig, OBSConfig)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("axes", [("layer_attention", "layer_mlp", "mlp"), ("layer", "mlp", "attention")])
def test_layers_and_branches_go_in_steps(method, name, axes):
    if method is OBSConfig:
        axes = ("mlp", "attention")  # it scores no others
    config = method(0.6, axes=axes, num_steps=3, allocation="global", standardise="sum", seed=3)
    result = prune(tiny_model(name), config, calibration=BATCHES)
    plan = result.plan
    assert plan.achieved["decoder"] == pytest.approx(0.6, abs=0.2)
    assert plan.num_parameters(result.structure) == sum(p.numel() for p in result.model.parameters())
    assert plan.config == config
    assert set(result.scores) == {axis.name for axis in selected_axes(result.structure, config)}


def test_the_budget_of_time_goes_in_steps():
    model, structure = shared_model("llama"), shared_structure("llama")
    table = latency_table(structure)
    config = MagnitudeConfig(0.4, axes=("mlp", "layer_mlp"), budget="latency", allocation="global")
    once, steps = (prune(model, dataclasses.replace(config, num_steps=n), latency=table).plan for n in (1, 4))
    assert steps.achieved["latency"] == pytest.approx(0.4, abs=0.1)
    assert steps.kept_indices == once.kept_indices


def test_gradients_are_taken_anew_on_the_pruned_model():
    model = tiny_model("llama").float()
    config = LLMPrunerConfig(0.5, criterion="first_order", allocation="uniform")
    once, twice = (prune(model, dataclasses.replace(config, num_steps=n), calibration=BATCHES) for n in (1, 2))
    assert once.plan.kept_indices != twice.plan.kept_indices
    assert twice.plan.achieved["decoder"] == pytest.approx(0.5, abs=0.03)
    assert sum(p.numel() for p in twice.model.parameters()) == twice.plan.num_parameters(twice.structure)
    assert twice.scores.keys() == once.scores.keys()


@pytest.mark.parametrize("limits", [{"protect": ("layers.1.*",)}, {"layers": (0, 2)}])
def test_limits_name_layers_of_the_dense_model_although_layers_go(limits):
    model = shared_model("llama")
    config = RandomConfig(0.6, axes=("layer", "mlp", "attention"), num_steps=3, seed=3, **limits)
    result = prune(model, config)
    plan = result.plan
    assert 1 not in plan.removed_layers
    assert not any(name.startswith("layers.1.") for name in plan.kept_indices)
    assert plan.removed_layers
    assert plan.num_parameters(result.structure) == sum(p.numel() for p in result.model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_scores_of_the_pruned_model_go_where_its_units_are_in_the_dense_one(name):
    model, structure = shared_model(name), shared_structure(name)
    config = MagnitudeConfig(0.5, axes=("mlp", "layer"), allocation={"layer": 1, "mlp": 1})
    dense = score(model, structure, config)
    done = allocate(dense, structure, config)
    assert done.removed_layers or name == "mixtral"
    pruned = apply_plan(model, structure, done)
    now, own = for_pruned(structure, infer_structure(pruned), config, done, 0.8)
    assert own.pruning_ratio == pytest.approx((0.8 - done.achieved["decoder"]) / (1 - done.achieved["decoder"]))
    found = in_dense_numbering(score(pruned, now, own), structure, done)
    for axis in (axis for axis in structure.axes.values() if axis.name in found and axis.kind == "mlp"):
        stays = sorted(set(range(axis.num_units)) - set(gone_units(done, axis.name)))
        torch.testing.assert_close(found[axis.name][stays], dense[axis.name][stays])  # a unit keeps its norm
        assert found[axis.name][gone_units(done, axis.name)].isnan().all()


def test_branches_that_are_gone_have_no_gradients_and_stay_gone():
    config = LLMPrunerConfig(0.26, criterion="vector", axes=("layer_mlp",), num_steps=2)
    plan = prune(shared_model("llama"), config, calibration=BATCHES).plan
    assert len(plan.removed_branches) == 2


def test_query_heads_of_the_last_group_are_one_unit():
    """With one KV group left the axis of the pruned model has query heads as units."""
    config = MagnitudeConfig(0.5, axes=("attention", "mlp"), allocation={"attention": 3, "mlp": 1}, num_steps=4)
    plan = prune(shared_model("llama"), config).plan
    assert min(plan.widths[f"layers.{layer}.attention"] for layer in range(3)) == 1
    assert plan.achieved["decoder"] == pytest.approx(0.5, abs=0.05)


def test_a_step_too_small_is_left_to_the_next():
    model = shared_model("llama")
    config = MagnitudeConfig(0.05, axes=("attention",), num_steps=4, allocation="global")
    assert prune(model, config).plan.kept_indices
    with pytest.raises(BudgetError, match="nothing"):
        prune(model, dataclasses.replace(config, pruning_ratio=1e-4))


def test_the_dense_model_is_left_as_it_was():
    model = shared_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, MagnitudeConfig(0.4, num_steps=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
