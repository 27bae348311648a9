"""Axes in blocks, each of which keeps equally many units of its own: query heads inside of KV groups."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from models import (
    logits,
    make_plan,
    shared_model,
    shared_structure,
    tiny_config,
    tiny_model,
    token_ids,
)
from test_allocation import latency_table
from test_export_plain import difference, exported, saved
from transformers import AutoModelForCausalLM

from hf_prune.allocation import allocate
from hf_prune.checkpoint.files import needs_plugin
from hf_prune.config import (
    LLMPrunerConfig,
    MagnitudeConfig,
    OBSConfig,
    PolicyGradientConfig,
    PruneNetConfig,
    PruningConfig,
    RandomConfig,
    WandaConfig,
    selected_axes,
)
from hf_prune.errors import BudgetError, ConfigError, PlanError, StructureError
from hf_prune.layers.masking import masked
from hf_prune.methods import score
from hf_prune.methods.elimination import removal_costs
from hf_prune.pipeline import prune
from hf_prune.plan import PruningPlan
from hf_prune.repair.preview import RepairPreview
from hf_prune.structure import layouts as lay
from hf_prune.structure.inference import infer_structure
from hf_prune.structure.layouts import Concat, Fixed, Product, Units
from hf_prune.surgery.pruning import apply_plan

GROUPED = ("llama_tied", "qwen2", "gemma3_text", "phi3", "falcon", "mixtral")
QUERIES = "layers.0.attention.queries"
BATCHES = [{"input_ids": token_ids(4, 16, seed=seed)} for seed in range(3)]


def test_layouts_of_blocks():
    """Three groups of two heads of two entries beside one more each: found by hand, positions counted from 0."""
    queries = Units("q", 2, "kv", 3)
    layout = Product((Units("kv", 3), Concat((queries, Fixed(1))), Fixed(2)))
    assert str(layout) == "(kv × [q + 1] × 2)"
    assert lay.size(layout, {}) == 18
    assert lay.size(layout, {"q": 3}) == 12
    assert lay.size(layout, {"q": 3, "kv": 2}) == 8
    assert lay.unit_ids(layout, "q").tolist() == [0, 0, 1, 1, -1, -1, 2, 2, 3, 3, -1, -1, 4, 4, 5, 5, -1, -1]
    kept = {"q": (1, 2, 5)}
    assert lay.indices(layout, kept).tolist() == [2, 3, 4, 5, 6, 7, 10, 11, 14, 15, 16, 17]
    assert lay.indices(layout, {**kept, "kv": (0, 2)}).tolist() == [2, 3, 4, 5, 14, 15, 16, 17]
    assert lay.reduce(torch.ones(18), [layout], "q").tolist() == [2.0] * 6


def test_only_grouped_heads_have_blocks():
    for family in ("llama", "falcon", "falcon_mqa", "gpt2"):
        structure = shared_structure(family)
        found = structure.axes_of("query_heads")
        heads, groups = tiny_config(family).num_attention_heads, structure.axes["layers.0.attention"].num_units
        assert bool(found) == (groups < heads)
        for axis in found:
            assert (axis.num_units, axis.num_blocks, axis.block) == (heads, groups, f"layers.{axis.layer}.attention")
            assert axis.branch == "attention"
            assert {m.parameter for m in structure.members[axis.name]} <= {
                m.parameter for m in structure.members[axis.block]
            }


@pytest.mark.parametrize("family", GROUPED)
def test_heads_and_groups_go_together(family, tmp_path):
    """Masked = sliced with both axes pruned in every layer, or one number of heads everywhere; loaded = saved."""
    model, structure = shared_model(family), shared_structure(family)
    heads = structure.axes[QUERIES]
    one = {axis.name: axis.first(axis.num_blocks) for axis in structure.axes_of("query_heads")}
    group = {f"layers.{layer}.attention": (1,) for layer in range(len(structure.layer_paths))}
    for kept in (one, {**one, **group}):
        plan = make_plan(structure, kept)
        plan.check(structure)
        pruned = apply_plan(model, structure, plan)
        assert sum(p.numel() for p in pruned.parameters()) == plan.num_parameters(structure)
        with masked(model, structure, plan):
            expected = logits(model)
        assert torch.allclose(logits(pruned), expected, rtol=1e-9, atol=1e-12)
        assert (expected - logits(model)).abs().max() > 1e-3
        if family != "falcon":  # one number says it
            assert not needs_plugin(pruned.config)
            assert pruned.config.num_attention_heads == (1 if group.keys() <= kept.keys() else heads.num_blocks)
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    if family == "mixtral":
        loaded.set_experts_implementation("batched_mm")
    assert torch.allclose(logits(loaded), logits(pruned), rtol=1e-5, atol=1e-6)
    tokens = [loaded.generate(token_ids(1, 5), max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*tokens)
    assert not any(axis.kind == "query_heads" for axis in infer_structure(loaded).axes.values())


def test_fourteen_heads_on_two_groups_become_twelve():
    config = copy.deepcopy(shared_model("qwen2").config)
    values = {**config.to_dict(), "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 28}
    model = AutoModelForCausalLM.from_config(type(config).from_dict(values))
    result = prune(model, MagnitudeConfig(1 / 7, axes=("query_heads",), budget="units"))
    assert result.plan.achieved["units"] == pytest.approx(1 / 7)
    assert (result.model.config.num_attention_heads, result.model.config.num_key_value_heads) == (12, 2)
    assert not needs_plugin(result.model.config)


@pytest.mark.parametrize("family", ["llama_tied", "falcon"])
def test_plans_take_the_least_of_each_block_and_nest(family):
    structure = shared_structure(family)
    axes = structure.axes_of("query_heads")
    generator = torch.Generator().manual_seed(3)
    scores = {axis.name: torch.rand(axis.num_units, generator=generator) for axis in axes}
    least, kept = {axis.name: set(range(axis.num_units)) for axis in axes}, {}
    for ratio in (0.3, 0.6, 0.9):  # one of each block stays
        plan = allocate(scores, structure, PruningConfig(ratio, axes=("query_heads",), budget="units"))
        assert PruningPlan.from_json(plan.to_json()) == plan
        for axis in axes:
            kept[axis.name] = plan.kept_indices[axis.name]
            table = scores[axis.name].view(axis.num_blocks, -1)
            best = table.argsort(1, descending=True)[:, : len(kept[axis.name]) // axis.num_blocks].sort(1).values
            expected = best + torch.arange(axis.num_blocks)[:, None] * table.shape[1]
            assert kept[axis.name] == tuple(expected.flatten().tolist())
            assert set(kept[axis.name]) <= least[axis.name]
            least[axis.name] = set(kept[axis.name])
    few = PruningConfig(0.3, axes=("query_heads",), budget="units", min_units=axes[0].num_units // axes[0].num_blocks)
    with pytest.raises(BudgetError, match="min_units"):
        allocate(scores, structure, few)


def test_plans_without_heads_are_what_they_were():
    """A plan lists the axes inside of others only where they lose units, or are asked for."""
    structure, config = shared_structure("llama"), RandomConfig(0.3)
    plan = allocate(
        {axis.name: torch.rand(axis.num_units) for axis in selected_axes(structure, config)}, structure, config
    )
    assert not any("queries" in name for name in plan.num_units)
    plan.check(structure)
    with pytest.raises(PlanError, match=r"keeps \[2, 1, 0\] units of its blocks, expected equally many"):
        make_plan(structure, {QUERIES: (0, 1, 2)}).check(structure)
    dense = dataclasses.replace(structure, axes={n: a for n, a in structure.axes.items() if n != QUERIES})
    with pytest.raises(PlanError, match="no such prunable axis"):
        make_plan(structure, {QUERIES: (0, 2, 4)}).check(dense)


LEARN = {"policy_steps": 3, "windows_per_step": 4, "num_masks": 2, "init_samples": 6}
METHODS = {
    "magnitude": MagnitudeConfig(0.2, axes=("query_heads",)),
    "wanda": WandaConfig(0.2, axes=("query_heads",)),
    "fisher": LLMPrunerConfig(0.2, axes=("query_heads",)),
    "vector": LLMPrunerConfig(0.2, axes=("query_heads",), criterion="vector"),
    "obs": OBSConfig(0.2, axes=("query_heads",)),
    "prunenet": PruneNetConfig(0.2, axes=("query_heads",), num_episodes=2),
    "policy_gradient": PolicyGradientConfig(0.2, axes=("query_heads",), **LEARN),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_score_heads(name):
    """Every head has a score; heads that change places within their groups take it along."""
    model = tiny_model("llama_tied", dtype=torch.float32)
    structure, config = infer_structure(model), METHODS[name]
    result = prune(model, config, calibration=BATCHES)
    axis = structure.axes[QUERIES]
    assert result.scores[QUERIES].shape == (axis.num_units,)
    result.plan.check(structure)
    assert 0.1 < result.plan.achieved["decoder"] < 0.3
    if name in ("prunenet", "policy_gradient"):
        return  # learned from a seed
    order = torch.tensor([1, 2, 0, 5, 3, 4])
    state = model.state_dict()
    for member in structure.members[QUERIES]:
        ids = lay.unit_ids(structure.layouts[member.parameter][member.dim], QUERIES)
        where = torch.arange(len(ids))
        for unit, other in enumerate(order.tolist()):
            where[ids == unit] = torch.nonzero(ids == other)[:, 0]
        state[member.parameter].copy_(state[member.parameter].index_select(member.dim, where))
    found = score(model, structure, config, BATCHES)[QUERIES]
    torch.testing.assert_close(found, result.scores[QUERIES][order], rtol=1e-3, atol=1e-7)


def test_elimination_leaves_equally_many_of_each_block():
    """Against choosing the cheapest one by one, of blocks that may still lose units; the second block is cheaper."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    weight[:, 6:] *= 0.1
    units, gone = torch.arange(6).repeat_interleave(2), []
    gram = x.T @ x
    costs = removal_costs([gram.clone()], [weight], units, 2, 0.0, num_blocks=2)
    while len(gone) < 4:
        trials = {}
        for unit in set(range(6)) - set(gone):
            block = [other for other in gone if other // 3 == unit // 3]
            left = [i for i in range(12) if int(units[i]) not in (*gone, unit)]
            fit = torch.linalg.solve(gram[left][:, left], gram[left] @ weight.T)
            error = weight.T.clone()
            error[left] -= fit
            if len(block) < 2:
                trials[unit] = float((error * (gram @ error)).sum())
        gone.append(min(trials, key=lambda unit: trials[unit]))
    assert gone[:2] != sorted(gone[:2], key=lambda unit: unit // 3) or gone[0] // 3 == gone[1] // 3 == 1
    assert sorted(gone) == torch.nonzero(costs.isfinite())[:, 0].tolist()
    assert sorted(unit // 3 for unit in gone) == [0, 0, 1, 1]


def test_selection_repair_and_the_walk_from_disk(tmp_path):
    """Groups, heads inside of them and channels: the same bits from disk, and a smaller error once repaired."""
    dense = tiny_model("llama_tied", dtype=torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    kinds = ("query_heads", "mlp")
    config = LLMPrunerConfig(
        0.4, axes=kinds, selection="obs", repair="least_squares", num_steps=2, allocation="uniform"
    )
    wanted = prune(dense, config, calibration=BATCHES)
    found = prune(tmp_path / "dense", config, calibration=BATCHES, layers_on="disk")
    assert found.plan.kept_indices == wanted.plan.kept_indices
    assert any("queries" in name for name in wanted.plan.kept_indices)
    assert all(torch.equal(found.scores[name], values) for name, values in wanted.scores.items())
    assert torch.allclose(logits(found.model), logits(wanted.model), rtol=1e-4, atol=1e-5)
    wanted.plan.check(wanted.structure)
    plain = apply_plan(dense, wanted.structure, wanted.plan)
    ids = torch.cat([batch["input_ids"] for batch in BATCHES])
    errors = [(logits(model, ids) - logits(dense, ids)).square().mean() for model in (wanted.model, plain)]
    assert errors[0] < 0.8 * errors[1]


def test_steps_do_not_matter_where_scores_do_not_change():
    model = tiny_model("llama_tied", dtype=torch.float32)
    config = MagnitudeConfig(0.5, axes=("attention", "query_heads", "mlp"), allocation="global", norm="l1")
    once, steps = (prune(model, dataclasses.replace(config, num_steps=n)).plan for n in (1, 3))
    assert any("queries" in name for name in once.kept_indices)
    assert steps.kept_indices == once.kept_indices


def test_search_judges_groups_and_heads_as_repair_leaves_them():
    model = tiny_model("llama_tied", dtype=torch.float32)
    structure = infer_structure(model)
    preview = RepairPreview(model, structure, BATCHES, 0.0)
    kept = {"layers.0.attention": (1,), QUERIES: (0, 1, 3, 5)}
    plan = make_plan(structure, kept)
    before = logits(model)
    with preview.applied(plan), masked(model, structure, plan):
        weight = model.get_parameter("model.layers.0.self_attn.o_proj.weight")
        zero = (weight == 0).all(0).view(6, 10).all(1)
        assert zero.tolist() == [True, True, True, False, True, False]
        assert (logits(model) - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before)


def test_exports(tmp_path):
    """Other numbers of heads and groups in each layer: zeros where the widest layer has more."""
    kept = {QUERIES: (0, 2, 3, 5), "layers.0.mlp": tuple(range(30)), "layers.1.attention": (1,)}
    path, pruned = saved(tmp_path, "llama_tied", {**kept, "layers.1.attention.queries": (1, 5)})
    _, model = exported(path, tmp_path / "plain")
    assert difference(pruned, model) < 1e-5
    assert model.config.num_attention_heads == 6
    everywhere = {f"layers.{i}.attention.queries": (0, 2, 3, 5) for i in range(3)}
    path, pruned = saved(tmp_path / "same", "llama_tied", {**everywhere, "layers.0.mlp": tuple(range(30))})
    _, model = exported(path, tmp_path / "same" / "plain")
    assert difference(pruned, model) < 1e-5
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ConfigError, match="a policy cannot count units inside of others"):
        PolicyGradientConfig(0.2, axes=("attention", "query_heads"))
    with pytest.raises(ConfigError, match="none of query_heads where the budget is latency"):
        RandomConfig(0.2, axes=("mlp", "query_heads"), budget="latency")
    with pytest.raises(StructureError, match="no axis of kind 'query_heads'"):
        prune(shared_model("gpt2"), RandomConfig(0.2, axes=("query_heads",)))
    table = latency_table(shared_structure("llama"))
    with pytest.raises(PlanError, match=f"says nothing about the axis {QUERIES}"):
        table.predict_plan(make_plan(shared_structure("llama"), {QUERIES: (0, 2, 4)}))
