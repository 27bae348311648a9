import dataclasses
import itertools
import logging

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from structures import llama

from hf_prune.allocation import allocate, rounding
from hf_prune.config import PruningConfig, selected_axes
from hf_prune.errors import BudgetError, ConfigError, ScoreError, StructureError
from hf_prune.latency import LatencyTable
from hf_prune.plan import PruningPlan, prunable_units
from hf_prune.structure import layouts as lay

KINDS = ("mlp", "attention", "hidden", "layer", "layer_attention", "layer_mlp")


def random_scores(structure, seed=0, levels=None):
    """One score per unit of every axis; few `levels` make ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(axis.num_units, generator=generator) for name, axis in structure.axes.items()}
    return {name: (values * levels).floor() for name, values in scores.items()} if levels else scores


@st.composite
def cases(draw):
    """A structure, scores and the settings of a config without its ratio."""
    structure = llama(
        num_layers=draw(st.integers(1, 4)),
        hidden=draw(st.sampled_from([8, 20])),
        mlp=draw(st.integers(2, 40)),
        kv=draw(st.integers(2, 4)),
        group=draw(st.integers(1, 2)),
        head_dim=4,
        vocab=16,
        fused=draw(st.booleans()),
        tied=draw(st.booleans()),
    )
    num_layers = len(structure.layer_paths)
    axes = draw(st.lists(st.sampled_from(KINDS), min_size=1, unique=True))
    assume(num_layers > 1 or not any(kind.startswith("layer") for kind in axes))
    weights = st.floats(0.1, 3)
    mapping = {kind: draw(weights) for kind in draw(st.lists(st.sampled_from(axes), min_size=1, unique=True))}
    mapping = draw(st.sampled_from([mapping, {"*": 1.0}, mapping | {"*": draw(weights)}]))
    settings_ = {
        "axes": tuple(axes),
        "budget": draw(st.sampled_from(["decoder", "model", "units", *(["latency"] if "hidden" not in axes else [])])),
        "allocation": draw(st.sampled_from(["uniform", "uniform", "global", "global", "spectral", mapping, mapping])),
        "standardise": draw(st.sampled_from(["none", "sum", "mean", "zscore"])),
        "round_to": draw(st.sampled_from([None, None, 3, 8, "auto"])),
        "min_units": draw(st.integers(1, 3)),
        "layers": draw(st.none() | st.sets(st.integers(0, num_layers - 1), min_size=1).map(tuple)),
        "protect": draw(st.sampled_from([(), (), ("layers.0.*",), ("*.attention",), ("hidden",)])),
    }
    scores = random_scores(structure, draw(st.integers(0, 99)), draw(st.sampled_from([None, 2, 5])))
    return structure, scores, settings_


def try_allocate(case, ratio):
    structure, scores, settings_ = case
    num_layers = len(structure.layer_paths)
    extra = {"exponents": {layer: 2 + layer % 3 for layer in range(num_layers)}}
    if settings_["budget"] == "latency":
        extra["latency"] = latency_table(structure)
    try:
        return allocate(scores, structure, PruningConfig(ratio, **settings_), **extra)
    except BudgetError:
        return None
    except ConfigError as error:
        if "fits none of the axes" in str(error):  # the mapping names what protect or layers keep whole
            return None
        raise


def latency_table(structure, seed=0):
    """A made-up table: convex in the widths, layers alike."""
    axes = {}
    for axis in structure.axes.values():
        if axis.layer == 0 and not axis.block:
            n, suffix = axis.num_units, axis.name.split(".", 2)[2]
            widths = sorted({1, (n + 1) // 2, n - 1} - {0, n})
            axes[suffix] = tuple((w, 0.01 * (n - w), 0.002 * (n - w) ** 1.5) for w in widths)
    saved = {name: (0.01 * rows[0][0] + rows[0][1], 0.002 + rows[0][2]) for name, rows in axes.items()}
    layer = tuple(0.003 + sum(saved[name][i] for name in saved) for i in range(2))
    num_layers = len(structure.layer_paths)
    return LatencyTable(
        model_type=structure.model_type,
        num_units={
            name: axis.num_units for name, axis in structure.axes.items() if axis.layer is not None and not axis.block
        },
        dense=tuple(0.5 + num_layers * value for value in layer),
        family_of=(0,) * num_layers,
        whole=({**saved, "layer": layer},),
        axes=(axes,),
        batch_size=1,
        prompt_len=8,
        new_tokens=4,
        device="cpu",
        dtype="float32",
        num_threads=1,
    )


def kept_sets(plan):
    kept = {name: set(plan.kept_indices.get(name, range(total))) for name, total in plan.num_units.items()}
    kept.update({name: set() for name in plan.vanished_axes})
    for name in ("layers.attention", "layers.mlp"):
        kept[name] = kept.get(name, set()) - plan.removed_layers
    return kept


ratios = st.floats(0.01, 0.99)


@settings(max_examples=150, deadline=None)
@given(cases(), ratios, ratios)
def test_law_5_kept_sets_are_nested_and_plans_repeat(case, first, second):
    small, large = try_allocate(case, min(first, second)), try_allocate(case, max(first, second))
    assume(small is not None and large is not None)
    before, after = kept_sets(small), kept_sets(large)
    assert all(after[name] <= before[name] for name in before)
    assert try_allocate(case, min(first, second)) == small
    assert PruningPlan.from_json(small.to_json()) == small


@settings(max_examples=200, deadline=None)
@given(cases(), ratios)
def test_law_7_budget_is_met_within_one_step_per_axis(case, ratio):
    plan = try_allocate(case, ratio)
    assume(plan is not None)
    structure, _, settings_ = case
    selected = selected_axes(structure, plan.config)
    steps = {axis.name: rounding(axis, plan.config, structure) for axis in selected}
    widths = plan.widths
    if settings_["budget"] == "latency":
        table = latency_table(structure)
        one_each = sum(steps[axis.name] * dearest_unit(table, axis) for axis in selected)
        dense = table.predict({}).total_s
        assert plan.achieved["latency"] == pytest.approx(1 - table.predict_plan(plan).total_s / dense)
        assert abs(plan.achieved["latency"] - ratio) * dense <= one_each * (1 + 1e-9)
        return
    if settings_["budget"] == "units" and settings_["allocation"] == "uniform":
        for axis in selected:
            if axis.name in plan.kept_indices and not axis.name.startswith("layers.attention"):
                removed = axis.num_units - widths[axis.name]
                assert abs(removed - axis.num_units * ratio) <= steps[axis.name] + 0.5 or plan.removed_layers
        return
    budget = settings_["budget"]
    if budget == "units":
        total = sum(axis.num_units for axis in selected)
        tolerance = sum(steps[axis.name] + units_inside(structure, axis, selected) for axis in selected)
    else:
        total = structure.num_parameters(budget=budget)
        tolerance = sum(steps[axis.name] * unit_cost(structure, axis, budget) for axis in selected)
    assert abs(plan.achieved[budget] - ratio) * total <= tolerance * (1 + 1e-9)


def dearest_unit(table, axis):
    dense = table.predict({}).total_s
    if axis.kind == "layer":
        return max(table.seconds_per_unit(axis.name, axis.num_units))
    at = [dense - table.predict({axis.name: width}).total_s for width in range(axis.num_units + 1)]
    return max(before - after for before, after in itertools.pairwise(at))


def units_inside(structure, axis, selected):
    """Selected units of other axes that go with one unit of a layer axis, at most."""
    if axis.kind != "layer":
        return 0
    branch = axis.name.removeprefix("layers").removeprefix(".")
    inside = max(
        sum(other.num_units for other in selected if other.layer == layer and branch in ("", other.kind))
        for layer in range(axis.num_units)
    )
    return inside + sum(other.kind == "layer" and not branch for other in selected if other is not axis)


def unit_cost(structure, axis, budget):
    if axis.kind != "layer":
        dense, less = structure.widths, {axis.name: axis.num_units - 1}
        return structure.num_parameters(dense, budget) - structure.num_parameters(less, budget)
    config = PruningConfig(0.5)
    none = {"decoder": 0.0, "model": 0.0, "units": 0.0}
    kept = {axis.name: tuple(range(1, axis.num_units))}
    plan = PruningPlan(structure.model_type, None, prunable_units(structure), kept, config, none)
    return structure.num_parameters(budget=budget) - plan.num_parameters(structure, budget)


@settings(max_examples=200, deadline=None)
@given(cases(), ratios)
def test_law_7_limits_always_hold(case, ratio):
    plan = try_allocate(case, ratio)
    assume(plan is not None)
    structure, scores, _ = case
    config, widths = plan.config, plan.widths
    plan.check(structure)
    assert plan.kept_indices
    names = {axis.name: axis for axis in selected_axes(structure, config)}
    for name, kept in plan.kept_indices.items():
        axis = names[name]  # nothing else loses units
        assert widths[name] == len(kept)
        assert len(kept) % rounding(axis, config, structure) == 0
        if axis.kind != "layer":
            assert len(kept) >= min(config.min_units, axis.num_units)
            gone = set(range(axis.num_units)) - set(kept)
            assert max(scores[name][list(gone)]) <= min(scores[name][list(kept)])  # lowest scores go first
        else:
            gone = set(range(axis.num_units)) - set(kept)
            assert config.layers is None or gone - plan.removed_layers <= set(config.layers)
            assert "layers.0.*" not in config.protect or 0 not in gone
    assert (0, "attention") not in plan.removed_branches
    first = min(set(range(len(structure.layer_paths))) - plan.removed_layers)
    assert (first, "attention") not in plan.removed_branches


@settings(max_examples=150, deadline=None)
@given(cases(), ratios)
def test_law_4_predicted_count_is_the_count_of_what_stays(case, ratio):
    plan = try_allocate(case, ratio)
    assume(plan is not None)
    structure = case[0]
    for budget in ("decoder", "model"):
        total = 0
        for name in structure.counted(budget):
            owner = structure.owners.get(name)
            if owner and (owner.layer in plan.removed_layers or (owner.layer, owner.branch) in plan.removed_branches):
                continue
            shape = [len(lay.indices(layout, plan.kept_indices)) for layout in structure.layouts[name]]
            total += torch.Size(shape).numel()
        assert plan.num_parameters(structure, budget) == total
        assert plan.achieved[budget] == pytest.approx(1 - total / structure.num_parameters(budget=budget))


@settings(max_examples=60, deadline=None)
@given(cases(), ratios, st.integers(0, 99))
def test_law_6_permuting_scores_permutes_what_stays(case, ratio, seed):
    structure, _, settings_ = case
    scores = random_scores(structure, seed)  # without ties
    name = "layers.0.mlp"
    permutation = torch.randperm(structure.axes[name].num_units, generator=torch.Generator().manual_seed(seed))
    permuted = {**scores, name: scores[name][permutation]}
    plan, other = (
        try_allocate((structure, scores, settings_), ratio),
        try_allocate((structure, permuted, settings_), ratio),
    )
    assume(plan is not None and other is not None)
    everything = tuple(range(structure.axes[name].num_units))
    assert set(permutation[list(other.kept_indices.get(name, everything))].tolist()) == set(
        plan.kept_indices.get(name, everything)
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("ratio", "groups", "channels"), [(0.2, 4, 768), (0.3, 3, 704), (0.5, 2, 512)])
def test_uniform_by_hand(fused, ratio, groups, channels):
    # Attention is 1/5 of the decoder. At 20 % no whole group of 4 is due: the MLP gives 20 of its 80 %.
    structure = llama(fused=fused)
    plan = allocate(random_scores(structure), structure, PruningConfig(ratio))
    for layer in range(8):
        assert plan.widths[f"layers.{layer}.attention"] == groups
        assert plan.widths[f"layers.{layer}.mlp"] == channels
    assert plan.achieved["decoder"] == pytest.approx(ratio, abs=1e-9)
    assert plan.num_parameters(structure, "decoder") == 7864320 * (1 - ratio)


def test_uniform_splits_a_dear_step_by_score():
    structure = llama()
    scores = random_scores(structure)
    for layer in range(8):
        scores[f"layers.{layer}.attention"] += (layer * 3) % 8  # cheapest first: 0, 3, 6, 1, 4, 7, 2, 5
    plan = allocate(scores, structure, PruningConfig(0.3, axes=("attention",), budget="units", allocation="global"))
    assert plan.achieved["units"] == pytest.approx(0.3, abs=1 / 32)
    plan = allocate(scores, structure, PruningConfig(3 * 49152 / 7864320, axes=("attention",)))
    assert set(plan.kept_indices) == {f"layers.{layer}.attention" for layer in (0, 3, 6)}


def test_global_removes_the_lowest_score_per_parameter_first():
    structure = llama(num_layers=2, hidden=16, mlp=8, kv=2, group=1, head_dim=4, vocab=16)
    scores = {name: torch.full((n,), 1e5) for name, n in structure.widths.items()}
    scores["layers.0.mlp"][3] = 48.0  # 48 parameters: 1 each
    scores["layers.1.attention"][1] = 192.0  # 256 parameters: 0.75 each, so it goes first
    scores["layers.1.attention"][0] = 1e6
    config = PruningConfig(256 / structure.num_parameters(budget="decoder"), allocation="global")
    assert allocate(scores, structure, config).kept_indices.keys() == {"layers.1.attention"}
    config = dataclasses.replace(config, pruning_ratio=(256 + 48) / structure.num_parameters(budget="decoder"))
    plan = allocate(scores, structure, config)
    assert plan.kept_indices == {"layers.1.attention": (0,), "layers.0.mlp": (0, 1, 2, 4, 5, 6, 7)}


def test_units_budget_has_the_meaning_of_the_papers():
    structure = llama(mlp=1000)
    plan = allocate(random_scores(structure), structure, PruningConfig(0.3, budget="units"))
    for layer in range(8):
        assert plan.widths[f"layers.{layer}.mlp"] == 700
        assert plan.widths[f"layers.{layer}.attention"] == 3  # 4 - round(2.8)


def test_ragged_width_becomes_a_multiple_with_the_first_step():
    structure = llama(num_layers=2, mlp=100, hidden=16)
    config = PruningConfig(0.1, axes=("mlp",), budget="units", round_to=32)
    plan = allocate(random_scores(structure), structure, config)
    assert plan.widths["layers.0.mlp"] == plan.widths["layers.1.mlp"] == 96


@pytest.mark.parametrize(
    ("width", "multiple"), [(14336, 128), (4096, 128), (2048, 64), (1024, 32), (512, 16), (256, 8), (255, 1)]
)
def test_auto_rounding(width, multiple):
    structure, config = llama(num_layers=1, mlp=width), PruningConfig(0.3, round_to="auto")
    axis = structure.axes["layers.0.mlp"]
    assert rounding(axis, config, structure) == multiple
    assert rounding(dataclasses.replace(axis, kind="attention"), config, structure) == 1


def test_removed_layers_list_nothing_of_their_axes():
    structure = llama(num_layers=4, hidden=16, mlp=8, kv=2, group=1, head_dim=4, vocab=16)
    scores = random_scores(structure)
    scores["layers"] -= 1e6
    plan = allocate(scores, structure, PruningConfig(0.85, axes=("layer", "mlp", "attention"), allocation="global"))
    assert len(plan.removed_layers) == 3
    (stays,) = set(range(4)) - plan.removed_layers
    assert all(name == "layers" or name.startswith(f"layers.{stays}.") for name in plan.kept_indices)


def test_protected_layers_stay_whole():
    structure = llama(num_layers=4)
    config = PruningConfig(0.5, axes=("layer",), protect=("layers.1.mlp", "layers.2"))
    assert allocate(random_scores(structure), structure, config).kept_indices == {"layers": (1, 2)}


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"pruning_ratio": 1e-6}, "would remove nothing: the smallest step removes 0.000"),
        ({"pruning_ratio": 1e-6, "budget": "units"}, "would remove nothing"),
        ({"pruning_ratio": 0.5, "min_units": 5000}, "would remove nothing"),
        ({"pruning_ratio": 0.5, "protect": ("*",)}, "would remove nothing"),
        ({"pruning_ratio": 0.5, "round_to": 4096, "axes": ("mlp",)}, "would remove nothing"),
        ({"pruning_ratio": 0.5, "layers": (1, 2)}, r"out of reach.*at most 0.237. of decoder"),
        ({"pruning_ratio": 0.5, "axes": ("attention",)}, r"out of reach.*at most 0.1500 of decoder"),
        ({"pruning_ratio": 0.9, "min_units": 512, "budget": "units", "axes": ("mlp",)}, "512 of 1024 units"),
        ({"pruning_ratio": 0.9, "min_units": 512, "allocation": "global", "budget": "units"}, "at most"),
    ],
)
def test_budget_errors_say_what_is_reachable(settings_, message):
    structure = llama()
    with pytest.raises(BudgetError, match=message):
        allocate(random_scores(structure), structure, PruningConfig(**settings_))


def test_score_errors_name_the_axis():
    structure = llama(num_layers=2)
    good, config = random_scores(structure), PruningConfig(0.3)
    name = "layers.1.mlp"
    for bad in (float("nan"), float("inf")):
        values = good[name].clone()
        values[7] = bad
        with pytest.raises(ScoreError, match=r"layers.1.mlp: 1 of 1024 scores are NaN or infinite"):
            allocate({**good, name: values}, structure, config)
    with pytest.raises(ScoreError, match=r"layers.1.mlp: found scores of shape \(1023,\), expected .*\(1024,\)"):
        allocate({**good, name: good[name][1:]}, structure, config)
    with pytest.raises(ScoreError, match=r"layers.1.mlp: no scores"):
        allocate({key: values for key, values in good.items() if key != name}, structure, config)
    with pytest.raises(ScoreError, match=r"layers.1.mlp: found scores of list"):
        allocate({**good, name: good[name].tolist()}, structure, config)
    with pytest.raises(ScoreError, match=r"layers.9.mlp: scores were given"):
        allocate({**good, "layers.9.mlp": good[name]}, structure, config)


def test_a_blocked_axis_stays_whole_with_a_warning(caplog):
    structure = llama(num_layers=2)
    name = "layers.1.mlp"
    axes = {**structure.axes, name: dataclasses.replace(structure.axes[name], blocker="op aten.sort has no rule")}
    structure = dataclasses.replace(structure, axes=axes)
    with caplog.at_level(logging.WARNING):
        plan = allocate(random_scores(structure), structure, PruningConfig(0.3))
    assert "layers.1.mlp stays whole: op aten.sort has no rule" in caplog.text
    assert name not in plan.num_units
    with pytest.raises(StructureError, match="no axis of kind"):
        allocate(random_scores(structure), dataclasses.replace(structure, axes={}), PruningConfig(0.3))


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_70b_shape_meets_the_budget(allocation):
    structure = llama(80, hidden=8192, mlp=28672, kv=8, group=8, head_dim=128, vocab=128256, tied=False)
    config = PruningConfig(0.3, allocation=allocation, round_to="auto")
    plan = allocate(random_scores(structure), structure, config)
    assert plan.achieved["decoder"] == pytest.approx(0.3, abs=0.003)
