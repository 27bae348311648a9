import dataclasses
import json

import pytest
from structures import llama

from hf_prune.config import RandomConfig
from hf_prune.errors import PlanError
from hf_prune.plan import PruningPlan, prunable_units

SMALL = {"num_layers": 3, "hidden": 16, "mlp": 12, "kv": 2, "group": 2, "head_dim": 4, "vocab": 32}


def make_plan(kept, **changes):
    structure = llama(**SMALL)
    fields = {
        "model_type": "llama",
        "base_model_name_or_path": "org/dense",
        "num_units": prunable_units(structure),
        "kept_indices": kept,
        "config": RandomConfig(0.3),
        "achieved": {"decoder": 0.3, "model": 0.2, "units": 0.25},
    }
    return PruningPlan(**{**fields, **changes})


def test_json_and_file_round_trip(tmp_path):
    plan = make_plan({"layers.0.mlp": (0, 3, 11), "layers": (0, 2), "layers.attention": (0, 2)})
    plan = dataclasses.replace(plan, kept_indices={"layers.0.mlp": (0, 3, 11), "hidden": (1, 2)})
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert PruningPlan.from_dict(plan.to_dict()) == plan
    assert json.loads(plan.to_json())["format"] == 1
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert PruningPlan.from_json(make_plan({}).to_json()) == make_plan({})


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    make_plan({}).save(path)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(PlanError, match="disk full"):
        make_plan({"layers.0.mlp": (1,)}).save(path)
    monkeypatch.undo()
    assert PruningPlan.load(path) == make_plan({})
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]


def test_widths_and_counts_with_removed_layers_and_branches():
    structure = llama(**SMALL)
    plan = make_plan({"layers": (0, 2), "layers.attention": (0,), "layers.0.mlp": (0, 1, 2), "hidden": tuple(range(8))})
    assert plan.removed_layers == {1}
    assert plan.removed_branches == {(2, "attention")}
    assert plan.vanished_axes == {"layers.1.attention", "layers.1.mlp", "layers.2.attention"}
    assert plan.widths == {
        "hidden": 8,
        "layers.0.attention": 2,
        "layers.0.mlp": 3,
        "layers.1.attention": 0,
        "layers.1.mlp": 0,
        "layers.2.attention": 0,
        "layers.2.mlp": 12,
        "layers": 2,
        "layers.attention": 1,
        "layers.mlp": 2,
    }
    attention, norms = 8 * (16 + 8 + 8 + 16), 2 * 8
    decoder = attention + 3 * 8 * 3 + 3 * 8 * 12
    assert plan.num_parameters(structure, "decoder") == decoder
    assert plan.num_parameters(structure) == decoder + 2 * norms + 8 + 32 * 8
    assert make_plan({}).num_parameters(structure) == structure.num_parameters()


def test_check_names_what_differs():
    plan = make_plan({"layers.0.mlp": (0, 1)})
    plan.check(llama(**SMALL))
    with pytest.raises(PlanError, match=r"layers.0.mlp: the plan keeps 2 of 12 units but this model has 10.*org/dense"):
        plan.check(llama(**{**SMALL, "mlp": 10}))
    with pytest.raises(PlanError, match=r"layers.3.attention: the plan has no such prunable axis"):
        plan.check(llama(**{**SMALL, "num_layers": 4}))
    with pytest.raises(PlanError, match=r"layers.2.attention: this model has no such"):
        plan.check(llama(**{**SMALL, "num_layers": 2}))
    with pytest.raises(PlanError, match=r"model type 'llama', found 'phi3'"):
        plan.check(llama(**SMALL, fused=True))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"layers.0.mlp": ()}, "one or more"),
        ({"layers.0.mlp": (1, 1)}, "ascending"),
        ({"layers.0.mlp": (2, 1)}, "ascending"),
        ({"layers.0.mlp": (-1, 1)}, "below 12"),
        ({"layers.0.mlp": (12,)}, "below 12"),
        ({"layers.0.mlp": [1]}, "tuple"),
        ({"layers.0.mlp": (True,)}, "whole numbers"),
        ({"layers.0.mlp": tuple(range(12))}, "only axes that lose"),
        ({"layers.9.mlp": (1,)}, "does not say"),
        ({"layers.mlp": (1, 2), "layers.0.mlp": (1,)}, "also removes"),
        ({"layers": (1, 2), "layers.0.mlp": (1,)}, "also removes"),
        ({"layers": (2,), "layers.attention": (0, 1)}, "removes the attention of all layers"),
    ],
)
def test_impossible_kept_indices_are_refused(kept, message):
    with pytest.raises(PlanError, match=message):
        make_plan(kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "plan format 2, expected 1"),
        ({"extra": 1}, r"unknown: \['extra'\]"),
        ({"achieved": None}, "achieved: found NoneType"),
        ({"achieved": {"decoder": 0.1}}, "achieved"),
        ({"achieved": {"decoder": 2, "model": 0.1, "units": 0.1}}, "achieved"),
        ({"num_units": {"layers.0.mlp": "12"}}, "layers.0.mlp"),
        ({"num_units": {"layers": 10**9}, "kept_indices": {"layers": [0]}}, "expected a whole number from 1 to 10000"),
        ({"num_units": {"layers.0.mlp": 10**30}, "kept_indices": {}}, "from 1 to 16777216"),
        ({"num_units": {"forward": 3}, "kept_indices": {}}, "'forward', which no axis"),
        ({"kept_indices": {"layers.0.mlp": 3}}, "tuple"),
        ({"base_model_name_or_path": 3}, "base_model"),
        ({"config": {"method": "random"}}, "config is damaged"),
    ],
)
def test_damaged_plans_are_refused(change, message):
    values = {**make_plan({"layers.0.mlp": (1,)}).to_dict(), **change}
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_dict(values)


def test_unreadable_plans_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="no plan can be read"):
        PruningPlan.load(path)
    path.write_text(make_plan({}).to_json()[:-20])
    with pytest.raises(PlanError, match="damaged"):
        PruningPlan.load(path)
    values = make_plan({}).to_dict()
    del values["achieved"]
    with pytest.raises(PlanError, match=r"missing: \['achieved'\]"):
        PruningPlan.from_dict(values)
