"""Pruning in several steps ends in one plan for the dense model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import shared_model, shared_structure, tiny_model, token_ids

from hf_prune import LLMPrunerConfig, MagnitudeConfig, RandomConfig, prune
from hf_prune.errors import ConfigError
from hf_prune.iterative import compose
from hf_prune.plan import make_plan


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_steps_do_not_matter_where_scores_do_not_change(name):
    """A unit's own norm stays what it is when other units of its layer go."""
    model = shared_model(name)
    config = MagnitudeConfig(0.3, axes=("mlp",), budget="units")
    once, twice = (prune(model, dataclasses.replace(config, num_steps=n)).plan for n in (1, 4))
    assert twice.kept_indices == once.kept_indices
    assert twice.achieved == once.achieved


def test_gradients_are_taken_anew_on_the_pruned_model():
    model = tiny_model("llama").float()
    batches = [{"input_ids": token_ids()}]
    config = LLMPrunerConfig(0.5, criterion="first_order", allocation="uniform")
    once, twice = (prune(model, dataclasses.replace(config, num_steps=n), calibration=batches) for n in (1, 2))
    assert once.plan.kept_indices != twice.plan.kept_indices
    assert twice.plan.achieved["decoder"] == pytest.approx(0.5, abs=0.03)
    assert sum(p.numel() for p in twice.model.parameters()) == twice.plan.num_parameters(twice.structure)
    assert twice.scores.keys() == once.scores.keys()


def test_limits_name_layers_of_the_dense_model_although_layers_go():
    model = shared_model("llama")
    config = RandomConfig(0.6, axes=("layer", "mlp", "attention"), num_steps=3, protect=("layers.1.*",), seed=3)
    result = prune(model, config)
    plan = result.plan
    assert 1 not in plan.removed_layers
    assert not any(name.startswith("layers.1.") for name in plan.kept_indices)
    assert plan.removed_layers
    assert plan.num_parameters(result.structure) == sum(p.numel() for p in result.model.parameters())


def test_composition_is_one_after_the_other():
    structure = shared_structure("llama")
    config = RandomConfig(0.3)
    first = make_plan(structure, {"layers.0.mlp": (1, 4, 6, 9), "layers": (0, 2)}, config, None)
    second = dataclasses.replace(
        make_plan(structure, {"layers.1.mlp": (0, 3)}, config, None),
        num_units={**first.num_units, "layers.0.mlp": 4},
        kept_indices={"layers.0.mlp": (0, 2), "layers.1.mlp": (0, 3)},
    )
    plan = compose(structure, config, first, second)
    assert plan.kept_indices == {"layers": (0, 2), "layers.0.mlp": (1, 6), "layers.2.mlp": (0, 3)}


def test_branches_go_in_one_step():
    with pytest.raises(ConfigError, match="num_steps"):
        prune(shared_model("llama"), RandomConfig(0.3, axes=("layer_attention",), num_steps=2))


def test_the_dense_model_is_left_as_it_was():
    model = shared_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune(model, MagnitudeConfig(0.4, num_steps=2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
