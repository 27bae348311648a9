"""The latency table: what it predicts is what was measured, and budgets of time are met. No test looks at a clock."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, make_plan, random_kept, shared_model, shared_structure, tiny_model
from structures import llama
from test_allocation import latency_table, random_scores

from hf_prune import (
    LatencyTable,
    MagnitudeConfig,
    PruningPlan,
    RandomConfig,
    allocate,
    apply_plan,
    measure_latency,
    prune,
)
from hf_prune.config import PruningConfig
from hf_prune.errors import BudgetError, CheckpointError, ConfigError, PlanError
from hf_prune.evaluation.speed import time_request
from hf_prune.structure.inference import infer_structure

MEASURING = "hf_prune.evaluation.latency"


def made_up_seconds(model, prompt_len, new_tokens, batch_size, *, each=False):
    """A machine that takes time in proportion to the parameters, and some for each layer."""
    work = 1e-6 * sum(p.numel() for p in model.parameters()) + 1e-3 * model.config.num_hidden_layers
    return batch_size * prompt_len * work, [batch_size * work * (1 + 0.1 * i) for i in range(new_tokens)]


def measured(model, structure, **changes):
    """`measure_latency` on the made-up machine."""
    with patch.object(sys.modules[MEASURING], "time_request", made_up_seconds):
        settings_ = {"prompt_len": 4, "new_tokens": 3, "repeats": 1, "num_widths": 2, "progress": False}
        return measure_latency(model, structure, **settings_ | changes)


@functools.cache
def table_of(family):
    return measured(shared_model(family), shared_structure(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_where_time_adds_up_the_table_predicts_every_plan(family):
    model, structure = shared_model(family), shared_structure(family)
    table = table_of(family)
    dense_prefill, dense_decode = made_up_seconds(model, 4, 3, 1)
    assert table.predict({}).prefill_s == pytest.approx(dense_prefill)
    assert table.predict({}).decode_s == pytest.approx(3 * dense_decode[1])  # of the median token
    rng = random.Random(0)
    for _ in range(3):
        plan = make_plan(structure, random_kept(structure, rng, ("attention", "mlp")))
        prefill, decode = made_up_seconds(apply_plan(model, structure, plan), 4, 3, 1)
        predicted = table.predict_plan(plan)
        assert predicted.prefill_s == pytest.approx(prefill, rel=1e-6)
        assert predicted.decode_s == pytest.approx(3 * decode[1], rel=1e-6)
        assert predicted.total_s == predicted.prefill_s + predicted.decode_s


@pytest.mark.parametrize("kept", [{"layers": (0, 2)}, {"layers.mlp": (0,)}, {"layers.attention": (0, 2)}])
def test_removed_layers_and_branches_are_predicted(kept):
    model, structure = shared_model("llama"), shared_structure("llama")
    plan = make_plan(structure, kept | {"layers.0.mlp": tuple(range(11))})
    prefill, _ = made_up_seconds(apply_plan(model, structure, plan), 4, 3, 1)
    assert table_of("llama").predict_plan(plan).prefill_s == pytest.approx(prefill, rel=1e-6)


def test_layers_of_other_shapes_are_measured_apart():
    dense = shared_model("llama")
    model = prune(dense, MagnitudeConfig(0.5, axes=("mlp",), layers=(1,), budget="units")).model
    structure = infer_structure(model)
    table = measured(model, structure, num_widths=5)
    assert table.family_of == (0, 1, 0)
    assert [row[0] for row in table.axes[0]["mlp"]] == [8, 16, 24, 32]
    assert [row[0] for row in table.axes[1]["mlp"]] == [4, 8, 12, 16]
    plan = make_plan(structure, {"layers.0.mlp": (1, 2, 3), "layers.1.mlp": (0, 5)})
    prefill, _ = made_up_seconds(apply_plan(model, structure, plan), 4, 3, 1)
    assert table.predict_plan(plan).prefill_s == pytest.approx(prefill, rel=1e-6)


def test_prefill_alone_and_settings_are_kept():
    model, structure = shared_model("llama"), shared_structure("llama")
    table = measured(model, structure, new_tokens=0, batch_size=2, prompt_len=5)
    assert table.predict({}).decode_s == 0.0
    assert (table.batch_size, table.prompt_len, table.new_tokens) == (2, 5, 0)
    assert (table.device, table.dtype, table.num_threads) == ("cpu", "float64", torch.get_num_threads())


def test_measuring_leaves_the_model_as_it_was():
    model, structure = tiny_model("llama").train(), shared_structure("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    table = measure_latency(model, structure, prompt_len=3, new_tokens=2, num_widths=2, repeats=1, progress=False)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert min(table.dense) > 0
    prefill, tokens = time_request(model, 3, 2, 1, each=True)
    assert prefill > 0
    assert len(tokens) == 2
    assert len(time_request(model, 3, 2, 1)[1]) == 1


# --- the table is a value ---------------------------------------------------------------------------------------------


def test_the_table_goes_through_a_file(tmp_path):
    table = latency_table(llama())
    table.save(tmp_path / "latency.json")
    again = LatencyTable.load(tmp_path / "latency.json")
    assert again == table
    assert again.predict({"layers.3.mlp": 77}) == table.predict({"layers.3.mlp": 77})


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("dense"),
        lambda values: values.update(more=1),
        lambda values: values.update(family_of=[0, 7]),
        lambda values: values.update(axes=3),
        lambda values: values.update(dense=["fast", "slow"]),
        lambda values: values.update(dense=[1.0, float("nan")]),
        lambda values: values.update(dense=[1.0, 2.0, 3.0]),
        lambda values: values.update(family_of=[-1] * len(values["family_of"])),
        lambda values: values["num_units"].update({"layers.0.mlp": 10**30}),
        lambda values: values["num_units"].update({"layers.0.mlp": "12"}),
        lambda values: values["num_units"].pop("layers.0.mlp"),
        lambda values: values.update(batch_size=0),
        lambda values: values.update(device=3),
        lambda values: values["axes"][0]["mlp"].reverse(),
        lambda values: values["axes"][0]["mlp"].append([10**12, 1.0, 1.0]),
        lambda values: values["whole"][0].update(forward=[1.0, 1.0]),
    ],
)
def test_damaged_tables_are_refused(damage, tmp_path):
    values = json.loads(latency_table(llama()).to_json())
    damage(values)
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(values))
    with pytest.raises(PlanError, match=r"the latency table is damaged \(.*expected JSON with the keys"):
        LatencyTable.load(path)


def test_table_errors(tmp_path):
    with pytest.raises(PlanError, match="no latency table can be read from"):
        LatencyTable.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="damaged"):
        LatencyTable.from_json("[]")
    with pytest.raises(CheckpointError, match="could not be written"):
        latency_table(llama()).save(tmp_path)
    table = latency_table(llama())
    with pytest.raises(PlanError, match="was measured on another llama model"):
        table.check(llama(mlp=1000))
    with pytest.raises(PlanError, match="says nothing about the axis hidden"):
        table.predict_plan(make_plan(llama(), {"hidden": tuple(range(200))}))
    for name, value in (("prompt_len", 0), ("new_tokens", -1), ("num_widths", 1), ("repeats", 0), ("batch_size", 1.5)):
        with pytest.raises(ConfigError, match=rf"{name}: found {value}, expected a whole number from"):
            measure_latency(shared_model("llama"), shared_structure("llama"), **{name: value})


@given(st.integers(0, 1024), st.integers(0, 1024), st.integers(0, 7))
def test_wider_is_never_predicted_to_be_faster(one, other, layer):
    table = latency_table(llama())
    dip = ((200, 0.01, 0.5), (500, 3.0, 0.7), (800, -1.0, 0.2))  # saved at 500 more than at 200, at 800 less than none
    table = dataclasses.replace(table, axes=(table.axes[0] | {"mlp": dip},), dense=(30.0, 30.0))
    slow, fast = (table.predict({f"layers.{layer}.mlp": width}) for width in (max(one, other), min(one, other)))
    assert slow.prefill_s >= fast.prefill_s - 1e-12
    assert slow.decode_s >= fast.decode_s - 1e-12
    assert table.predict({f"layers.{layer}.mlp": 1024}) == table.predict({})


def test_between_widths_the_table_interpolates():
    table = latency_table(llama(mlp=9))
    axes = table.axes[0] | {"mlp": ((3, 0.6, 6.0), (5, 0.2, 4.0))}
    table = dataclasses.replace(table, axes=(axes,), dense=(30.0, 30.0))
    dense = table.predict({})

    def saved(width):
        found = table.predict({"layers.1.mlp": width})
        return pytest.approx((dense.prefill_s - found.prefill_s, dense.decode_s - found.decode_s))

    assert saved(3) == (0.6, 6.0)
    assert saved(4) == (0.4, 5.0)
    assert saved(7) == (0.1, 2.0)
    assert saved(1) == (1.0, 8.0)  # the line goes on


# --- budgets of time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("allocation", ["uniform", "global", {"mlp": 2, "attention": 1}])
def test_the_budget_of_time_is_met_where_it_is_measured(family, allocation):
    model, structure, table = shared_model(family), shared_structure(family), table_of(family)
    result = prune(model, RandomConfig(0.3, budget="latency", allocation=allocation, seed=4), latency=table)
    before, after = (sum((p, 3 * d[1])) for p, d in (made_up_seconds(m, 4, 3, 1) for m in (model, result.model)))
    assert result.plan.achieved["latency"] == pytest.approx(1 - after / before, rel=1e-6)
    axes = [axis for axis in structure.axes.values() if axis.layer is not None and not axis.block]
    dearest = max(max(table.seconds_per_unit(axis.name, axis.num_units)) for axis in axes)
    assert abs(result.plan.achieved["latency"] - 0.3) * before <= dearest
    assert PruningPlan.from_json(result.plan.to_json()) == result.plan


def test_prune_measures_where_no_table_is_given(monkeypatch):
    monkeypatch.setattr(sys.modules["hf_prune.pipeline"], "measure_latency", lambda *_: table_of("llama"))
    config = RandomConfig(0.3, budget="latency")
    given = prune(shared_model("llama"), config, latency=table_of("llama"))
    assert prune(shared_model("llama"), config).plan == given.plan


def test_global_ranks_by_score_per_second():
    structure = llama(num_layers=2, mlp=100)
    table = latency_table(structure)
    slow = {"mlp": ((50, 5.0, 5.0),), "attention": ((2, 1e-4, 1e-4),)}
    table = dataclasses.replace(table, axes=(slow,), dense=(30.0, 30.0))
    config = PruningConfig(0.1, budget="latency", allocation="global")
    plan = allocate(random_scores(structure), structure, config, latency=table)
    assert set(plan.kept_indices) == {"layers.0.mlp", "layers.1.mlp"}  # attention saves no time
    assert plan.achieved["latency"] == pytest.approx(0.1, abs=0.01)


def test_a_table_without_that_budget_is_recorded_only():
    structure = llama()
    scores, table = random_scores(structure), latency_table(llama())
    plain = allocate(scores, structure, PruningConfig(0.3))
    plan = allocate(scores, structure, PruningConfig(0.3), latency=table)
    assert plan.kept_indices == plain.kept_indices
    assert plan.achieved == plain.achieved | {"latency": plan.achieved["latency"]}
    hidden = allocate(scores, structure, PruningConfig(0.3, axes=("hidden",)), latency=table)
    assert "latency" not in hidden.achieved


def test_latency_budget_errors():
    structure = llama()
    scores, table = random_scores(structure), latency_table(llama())
    config = PruningConfig(0.3, budget="latency")
    with pytest.raises(ConfigError, match="budget 'latency' needs a table of measured latencies"):
        allocate(scores, structure, config)
    with pytest.raises(ConfigError, match="cannot price hidden"):
        allocate(scores, structure, dataclasses.replace(config, axes=("hidden", "mlp")), latency=table)
    with pytest.raises(PlanError, match="was measured on another"):
        allocate(random_scores(llama(mlp=1000)), llama(mlp=1000), config, latency=table)
    with pytest.raises(BudgetError, match=r"of latency is out of reach.* let go at most 0\.\d+ of latency"):
        allocate(scores, structure, dataclasses.replace(config, min_units=900), latency=table)


@settings(max_examples=10)
@given(st.sampled_from(FAMILIES), st.integers(0, 999))
def test_predictions_are_at_most_dense_and_never_negative(family, seed):
    structure = shared_structure(family)
    table = latency_table(structure)
    plan = make_plan(structure, random_kept(structure, random.Random(seed), ("attention", "mlp")))
    found, dense = table.predict_plan(plan), table.predict({})
    assert 0 <= found.prefill_s <= dense.prefill_s
    assert 0 <= found.decode_s <= dense.decode_s
