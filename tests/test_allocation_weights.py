"""Mappings and spectral weights: who loses how much, by hand and against slow references."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import shared_model, shared_structure, tiny_model, token_ids
from structures import llama
from test_allocation import random_scores

from hf_prune import LLMPrunerConfig, MagnitudeConfig, WandaConfig, hill_exponents, prune
from hf_prune.allocation import allocate, spectral_weights
from hf_prune.allocation.spectral import hill_exponent
from hf_prune.config import CONFIGS, PruningConfig, RandomConfig
from hf_prune.errors import BudgetError, ConfigError, PlanError, ScoreError

# --- mappings ---------------------------------------------------------------------------------------------------------


def removed_fraction(plan, name):
    return 1 - plan.widths[name] / plan.num_units[name]


def test_a_pattern_gives_its_weight_to_each_axis():
    structure = llama(mlp=1000)
    config = PruningConfig(0.3, allocation={"layers.[0-3].mlp": 3, "layers.*.mlp": 1})
    plan = allocate(random_scores(structure), structure, config)
    first, later = ([removed_fraction(plan, f"layers.{i}.mlp") for i in layers] for layers in (range(4), range(4, 8)))
    assert max(first) - min(first) <= 0.001 + 1e-9
    assert max(later) - min(later) <= 0.001 + 1e-9
    assert first[0] == pytest.approx(3 * later[0], abs=0.004)
    assert not any(name.endswith("attention") for name in plan.kept_indices)  # nobody named it
    assert plan.achieved["decoder"] == pytest.approx(0.3, abs=2e-4)  # half a channel of four layers


@pytest.mark.parametrize("budget", ["units", "decoder"])
def test_a_kind_is_a_pool_in_which_units_compete(budget):
    """The policy-gradient paper's separate budgets: each kind loses its ratio, the lowest scores of all layers."""
    structure = llama(mlp=100)
    scores = random_scores(structure)
    config = PruningConfig(0.5, allocation={"attention": 1, "mlp": 1}, budget=budget)
    plan = allocate(scores, structure, config)
    for kind, total in (("attention", 8 * 4), ("mlp", 8 * 100)):
        names = [f"layers.{layer}.{kind}" for layer in range(8)]
        assert sum(plan.widths[name] for name in names) == total / 2
        gone = [scores[n][i] for n in names for i in range(plan.num_units[n]) if i not in plan.kept_indices.get(n, ())]
        kept = [scores[n][i] for n in names for i in plan.kept_indices.get(n, ())]
        if kind == "mlp":
            assert max(gone) <= min(kept)  # no floor was met
        assert len({plan.widths[name] for name in names}) > 1


def test_pools_take_weights_and_scores_can_be_standardised_inside():
    structure = llama(mlp=100)
    scores = random_scores(structure)
    for layer in range(8):
        scores[f"layers.{layer}.mlp"] *= 10**layer
    config = PruningConfig(0.3, allocation={"mlp": 2, "attention": 1}, budget="units")
    plan = allocate(scores, structure, config)
    share = {k: sum(plan.widths[f"layers.{i}.{k}"] for i in range(8)) for k in ("mlp", "attention")}
    assert (800 - share["mlp"]) / 800 == pytest.approx(2 * (32 - share["attention"]) / 32, abs=2 / 32)
    assert plan.widths["layers.7.mlp"] > 90 > 20 > plan.widths["layers.0.mlp"]
    fair = allocate(scores, structure, dataclasses.replace(config, standardise="mean"))
    assert max(fair.widths[f"layers.{i}.mlp"] for i in range(8)) < 85


def test_the_first_entry_that_fits_counts():
    structure = llama(num_layers=2, mlp=100)
    config = PruningConfig(0.2, allocation={"layers.1.*": 0, "*": 1})
    plan = allocate(random_scores(structure), structure, config)
    assert all(name.startswith("layers.0.") for name in plan.kept_indices)
    config = dataclasses.replace(config, allocation={"*": 1, "layers.1.*": 0})
    assert any(name.startswith("layers.1.") for name in allocate(random_scores(structure), structure, config).widths)


def test_equal_weights_are_uniform():
    structure = llama()
    scores = random_scores(structure)
    uniform = allocate(scores, structure, PruningConfig(0.37))
    mapping = allocate(scores, structure, PruningConfig(0.37, allocation={"*": 2.5}))
    assert mapping.kept_indices == uniform.kept_indices


def test_mapping_errors():
    structure = llama()
    scores = random_scores(structure)
    with pytest.raises(ConfigError, match=r"allocation: 'layers.9.mlp' fits none of the axes .*layers.0.mlp"):
        allocate(scores, structure, PruningConfig(0.3, allocation={"layers.9.mlp": 1, "*": 1}))
    with pytest.raises(ConfigError, match=r"allocation: 'hidden' fits none"):
        allocate(scores, structure, PruningConfig(0.3, allocation={"hidden": 1, "*": 1}))
    with pytest.raises(BudgetError, match=r"out of reach.*at most 0\.0999 of decoder"):
        allocate(scores, structure, PruningConfig(0.3, allocation={"layers.0.mlp": 1}))


@pytest.mark.parametrize(
    "value", [{}, {"mlp": -1}, {"mlp": 0}, {"mlp": "1"}, {"mlp": float("nan")}, {"": 1}, {1: 1}, [["mlp"]], [], 3]
)
def test_wrong_mappings_are_named(value):
    with pytest.raises(ConfigError, match=r"(?s)^allocation: found .*expected"):
        PruningConfig(0.3, allocation=value)


@given(st.dictionaries(st.text("mlp*.?[]", min_size=1), st.floats(0.01, 9) | st.integers(1, 5), min_size=1))
def test_a_mapping_is_a_value(mapping):
    config = RandomConfig(0.3, allocation=mapping)
    again = PruningConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_dict()["allocation"] == mapping
    assert list(again.to_dict()["allocation"]) == list(mapping)  # the order counts
    before = config.to_dict()
    mapping.clear()
    assert config.to_dict() == before


def test_mappings_go_through_prune_and_follow_layers_in_several_steps():
    model = shared_model("llama")
    mapping = {"layers.2.mlp": 3, "layers.*.mlp": 1}
    once = prune(model, MagnitudeConfig(0.3, axes=("mlp",), allocation=mapping))
    widths = once.plan.widths
    assert widths["layers.2.mlp"] < widths["layers.1.mlp"] == widths["layers.0.mlp"]
    assert once.model.config.pruning_config["settings"]["allocation"] == mapping
    config = RandomConfig(0.5, axes=("layer", "mlp"), allocation={"layer": 1, "layers.2.mlp": 1}, num_steps=2, seed=1)
    plan = prune(model, config).plan
    assert plan.removed_layers
    assert 2 not in plan.removed_layers
    assert set(plan.kept_indices) == {"layers", "layers.2.mlp"}


# --- spectral ---------------------------------------------------------------------------------------------------------


def slow_hill(matrix):
    values = sorted(float(s) ** 2 for s in torch.linalg.svdvals(matrix.double()))
    values = [v for v in values if v > 1e-10 * values[-1]]
    tail = values[len(values) // 2 :]
    return 1 + len(tail) / sum(math.log(v / tail[0]) for v in tail)


@given(st.integers(3, 24), st.integers(3, 24), st.integers(0, 999), st.floats(1e-3, 1e3))
def test_hill_exponent_is_the_slow_one(rows, columns, seed, scale):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = slow_hill(matrix)
    assert hill_exponent(matrix) == pytest.approx(expected, rel=1e-6)
    assert hill_exponent(matrix.T) == pytest.approx(expected, rel=1e-6)
    assert hill_exponent(scale * matrix) == pytest.approx(expected, rel=1e-6)
    assert hill_exponent(matrix.float()) == pytest.approx(expected, rel=1e-2)


def test_hill_exponent_of_a_power_law_is_its_exponent():
    """Eigenvalues drawn as a Pareto distribution with density ~ λ^-α have that α."""
    n, alpha = 2000, 2.5
    ranks = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    eigenvalues = (1 - ranks) ** (-1 / (alpha - 1))
    assert hill_exponent(torch.diag(eigenvalues.sqrt())) == pytest.approx(alpha, abs=0.02)


def test_hill_exponent_of_odd_matrices():
    assert hill_exponent(torch.zeros(4, 6)) is None
    assert hill_exponent(torch.ones(4, 6)) is None  # rank 1
    assert hill_exponent(torch.diag(torch.tensor([1.0, 2.0]))) is None  # a tail of one says nothing
    assert 100 < hill_exponent(torch.eye(8)) < math.inf
    low_rank = torch.randn(9, 4, dtype=torch.float64) @ torch.randn(4, 9, dtype=torch.float64)
    assert hill_exponent(low_rank) == pytest.approx(slow_hill(low_rank), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_exponents_of_a_layer_are_the_mean_over_its_matrices(family):
    model, structure = shared_model(family), shared_structure(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = hill_exponents(model, structure, progress=False)
    for layer, path in enumerate(structure.layer_paths):
        matrices = [
            matrix
            for name, weight in model.named_parameters()
            if name.startswith(path + ".") and weight.dim() >= 2
            for matrix in weight.detach().reshape(-1, *weight.shape[-2:])
        ]
        assert found[layer] == pytest.approx(sum(map(slow_hill, matrices)) / len(matrices), rel=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@given(st.lists(st.floats(1.5, 9), min_size=2, max_size=8, unique=True), st.floats(0, 0.9))
def test_spectral_weights_are_linear_and_heavy_tails_keep_more(exponents, epsilon):
    weights = spectral_weights(dict(enumerate(exponents)), epsilon)
    low, high = exponents.index(min(exponents)), exponents.index(max(exponents))
    assert weights[low] == pytest.approx(1 - epsilon)
    assert weights[high] == pytest.approx(1 + epsilon)
    for layer, exponent in enumerate(exponents):
        position = (exponent - exponents[low]) / (exponents[high] - exponents[low])
        assert weights[layer] == pytest.approx(1 + epsilon * (2 * position - 1))


@settings(max_examples=25)
@given(st.lists(st.floats(1.5, 9), min_size=4, max_size=4), st.floats(0, 0.6), st.floats(0.1, 0.5))
def test_spectral_fractions_follow_the_weights_and_their_mean_is_the_target(exponents, epsilon, ratio):
    """AlphaPruning, eq. 3: layer ratios are target · weight / mean weight, so that their mean is the target."""
    structure = llama(num_layers=4, mlp=2000, hidden=16)
    by_layer = dict(enumerate(exponents))
    config = PruningConfig(ratio, axes=("mlp",), budget="units", allocation="spectral", spectral_epsilon=epsilon)
    plan = allocate(random_scores(structure), structure, config, exponents=by_layer)
    weights = spectral_weights(by_layer, epsilon)
    mean = sum(weights.values()) / 4
    assume(ratio * max(weights.values()) / mean < 0.99)  # else the floor of that layer is met
    for layer, weight in weights.items():
        assert removed_fraction(plan, f"layers.{layer}.mlp") == pytest.approx(ratio * weight / mean, abs=1.01 / 2000)
    assert abs(plan.achieved["units"] - ratio) * 8000 <= 0.5 + 1e-6


def test_spectral_is_uniform_where_layers_are_alike():
    structure = llama()
    scores = random_scores(structure)
    config = PruningConfig(0.3, allocation="spectral")
    plan = allocate(scores, structure, config, exponents=dict.fromkeys(range(8), 3.0))
    assert plan.kept_indices == allocate(scores, structure, PruningConfig(0.3)).kept_indices


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_spectral_through_prune(family):
    model = tiny_model(family, dtype=torch.float32)
    with torch.no_grad():  # a heavier tail in layer 0
        for name, weight in model.named_parameters():
            if name.startswith(shared_structure(family).layer_paths[0] + ".") and weight.dim() == 2:
                weight += 30 * torch.outer(weight[:, 0], weight[0])
    exponents = hill_exponents(model, shared_structure(family), progress=False)
    assert min(exponents, key=exponents.get) == 0
    config = MagnitudeConfig(0.4, allocation="spectral", spectral_epsilon=0.8, axes=("mlp",), budget="units")
    widths = prune(model, config).plan.widths
    assert widths["layers.0.mlp"] == max(width for name, width in widths.items() if name.endswith("mlp") and width > 6)


def test_spectral_errors():
    structure, model = shared_structure("llama"), tiny_model("llama")
    scores = random_scores(structure)
    with pytest.raises(ConfigError, match="allocation 'spectral' looks at the weights: pass the dense `model`"):
        allocate(scores, structure, PruningConfig(0.3, allocation="spectral"))
    for value in (-0.1, 1.0, "0.3", None, float("nan"), True):
        with pytest.raises(ConfigError, match=r"spectral_epsilon: found .*expected a number from 0 and below 1"):
            PruningConfig(0.3, spectral_epsilon=value)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ScoreError, match=r"model.layers.1.mlp.up_proj.weight: linear algebra failed"):
        allocate(scores, structure, PruningConfig(0.3, allocation="spectral"), model=model)
    with torch.no_grad():
        for parameter in model.model.layers[2].parameters():
            parameter.zero_()
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 0.0
    with pytest.raises(ScoreError, match="layer 2 has no weight matrix with a spectrum"):
        hill_exponents(model, structure, progress=False)


# --- standardised scores ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standardise", ["sum", "mean", "zscore"])
@settings(max_examples=20)
@given(factors=st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=8))
def test_standardised_scores_do_not_depend_on_the_scale_of_an_axis(standardise, factors):
    structure = llama(num_layers=4, mlp=60)
    scores = random_scores(structure)
    names = [f"layers.{layer}.{kind}" for layer in range(4) for kind in ("attention", "mlp")]
    scaled = {**scores, **{name: scores[name] * factor for name, factor in zip(names, factors, strict=True)}}
    config = PruningConfig(0.4, allocation="global", standardise=standardise)
    plan, other = (allocate(s, structure, config) for s in (scores, scaled))
    differing = sum(plan.widths[name] != other.widths[name] for name in names)
    assert differing <= 1  # rounding in float32 may swap two units of nearly equal value


def test_standardised_by_hand():
    structure = llama(num_layers=2, hidden=16, mlp=4, kv=2, group=1, head_dim=4, vocab=16)
    scores = {name: torch.full((n,), 1e6) for name, n in structure.widths.items()}
    scores["layers.0.mlp"] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # 48 parameters each
    scores["layers.1.attention"] = torch.tensor([30.0, 70.0])  # 256 parameters each
    scores["layers.0.attention"], scores["layers.1.mlp"] = torch.tensor([50.0, 50.0]), torch.full((4,), 7.0)
    total = structure.num_parameters(budget="decoder")

    def first(standardise):
        config = PruningConfig(40 / total, allocation="global", standardise=standardise)
        return next(iter(allocate(scores, structure, config).kept_indices))

    assert first("none") == "layers.0.mlp"  # 1/48 before 30/256
    assert first("mean") == "layers.0.mlp"  # 1/2.5 = 0.4 before 30/50 = 0.6
    with pytest.raises(BudgetError, match="would remove nothing"):  # 0.3/256 before 0.1/48: too dear a step
        first("sum")
    config = PruningConfig(256 / total, allocation="global", standardise="sum")
    assert allocate(scores, structure, config).kept_indices == {"layers.1.attention": (1,)}
    scores["layers.0.mlp"] = torch.tensor([1.0, 2.0, 3.0, 3.5])  # z = −1.5, and −1 of (30, 70)
    assert first("zscore") == "layers.0.mlp"


def test_each_method_has_a_default_for_its_scores():
    defaults = {name: config(0.3).standardise for name, config in CONFIGS.items()}
    assert {name for name, value in defaults.items() if value == "sum"} >= {"magnitude", "wanda", "random"}
    assert defaults["llm_pruner"] == defaults["custom"] == "none"
    with pytest.raises(ConfigError, match=r"standardise: found 'max', expected one of"):
        WandaConfig(0.3, standardise="max")


def test_fisher_scores_and_mapping_by_kind_through_prune():
    model = tiny_model("qwen3", dtype=torch.float32)
    config = LLMPrunerConfig(0.5, budget="units", allocation={"attention": 1, "mlp": 1})
    plan = prune(model, config, calibration=[{"input_ids": token_ids()}]).plan
    for kind in ("attention", "mlp"):
        kept = sum(width for name, width in plan.widths.items() if name.endswith(kind) and name.count(".") == 2)
        total = sum(units for name, units in plan.num_units.items() if name.endswith(kind) and name.count(".") == 2)
        assert kept == total / 2


def test_a_plan_with_a_wrong_achieved_key_is_refused():
    plan = allocate(random_scores(llama()), llama(), PruningConfig(0.3))
    assert dataclasses.replace(plan, achieved=plan.achieved | {"latency": 0.3})
    with pytest.raises(PlanError, match="achieved: found"):
        dataclasses.replace(plan, achieved=plan.achieved | {"time": 0.3})
