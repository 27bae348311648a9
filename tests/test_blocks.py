"""Axes in blocks, each of which keeps equally many units of its own: query heads of KV groups, channels of experts."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random

import pytest
import torch
from models import (
    logits,
    make_plan,
    random_kept,
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
from hf_prune.format.building import needs_plugin
from hf_prune.layers.masking import masked
from hf_prune.layers.watch import watching
from hf_prune.layers.weights import eager_experts
from hf_prune.pipeline import prune
from hf_prune.plan import PruningPlan
from hf_prune.repair import select_repairable
from hf_prune.repair.preview import RepairPreview
from hf_prune.scores import score
from hf_prune.scores.elimination import removal_costs
from hf_prune.structure import layouts as lay
from hf_prune.structure.consumers import consumers_of
from hf_prune.structure.inference import infer_structure
from hf_prune.structure.layouts import Concat, Fixed, Product, Units
from hf_prune.surgery.pruning import apply_plan
from hf_prune.surgery.slicing import pad_tensor, slice_tensor

GROUPED = ("llama_tied", "qwen2", "gemma3_text", "phi3", "falcon", "mixtral")
QUERIES = "layers.0.attention.queries"
MLP, CHANNELS = "layers.0.mlp", "layers.0.mlp.channels"
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
    with pytest.raises(ConfigError, match="none of query_heads and expert_channels where"):
        RandomConfig(0.2, axes=("mlp", "query_heads"), budget="latency")
    with pytest.raises(StructureError, match="no axis of kind 'query_heads'"):
        prune(shared_model("gpt2"), RandomConfig(0.2, axes=("query_heads",)))
    table = latency_table(shared_structure("llama"))
    with pytest.raises(PlanError, match=f"says nothing about the axis {QUERIES}"):
        table.predict_plan(make_plan(shared_structure("llama"), {QUERIES: (0, 2, 4)}))


# --- channels of experts, each with its own ---------------------------------------------------------------------------

_MIXTURE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
MIXTURES = {
    "mixtral": {**_MIXTURE, "num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {
        **_MIXTURE,
        "num_experts": 5,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "gpt_oss": {**_MIXTURE, "num_local_experts": 4, "head_dim": 8, "sliding_window": 5},
    "deepseek_v3": {
        **_MIXTURE,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 12,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


@functools.cache
def mixture(family, dtype=torch.float64):
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**MIXTURES[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_experts_implementation("eager")  # grouped products want float32 and rows of whole 16 bytes
    return model.to(dtype).eval()


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_keep_channels_of_their_own(family, tmp_path):
    """Alone, and with whole experts and query heads gone too."""
    model = mixture(family)
    structure, rng = infer_structure(model), random.Random(family)
    own = random_kept(structure, rng, ("expert_channels",))
    assert own
    assert all(structure.axes[name].kind == "mlp" for name in (structure.axes[name].tied for name in own))
    others = random_kept(structure, rng, ("query_heads",))
    for axis in structure.axes_of("expert"):
        if axis.prunable:
            others[axis.name] = tuple(sorted(rng.sample(range(axis.num_units), axis.num_units - 1)))
    for kept in (own, {**own, **others}) if others else (own,):
        plan = make_plan(structure, kept)
        plan.check(structure)
        assert PruningPlan.from_json(plan.to_json()) == plan
        pruned = apply_plan(model, structure, plan)
        assert sum(p.numel() for p in pruned.parameters()) == plan.num_parameters(structure)
        with masked(model, structure, plan):
            expected = logits(model)
        torch.testing.assert_close(logits(pruned), expected, rtol=1e-9, atol=1e-12)
        assert (expected - logits(model)).abs().max() > 1e-3
        for name, tensor in model.state_dict().items():
            sliced = slice_tensor(name, tensor, structure, plan)
            padded = pad_tensor(name, sliced, structure, plan)
            assert padded.shape == tensor.shape
            assert torch.equal(slice_tensor(name, padded, structure, plan), sliced)
            assert torch.equal(padded, torch.where(padded == 0, 0, tensor))
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    loaded.set_experts_implementation("eager")
    torch.testing.assert_close(logits(loaded), logits(pruned), rtol=1e-5, atol=1e-6)
    tokens = [loaded.generate(token_ids(1, 5), max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*tokens)


def test_the_same_channels_of_all_experts_are_a_case_of_their_own():
    """A plan with the same sets everywhere leaves the same tensors as the axis of all experts; both do not go."""
    model = mixture("mixtral")
    structure = infer_structure(model)
    tied, own = (0, 3, 4, 17), tuple(20 * expert + unit for expert in range(4) for unit in (0, 3, 4, 17))
    plans = [make_plan(structure, {name: kept}) for name, kept in ((MLP, tied), (CHANNELS, own))]
    assert plans[0].num_parameters(structure) == plans[1].num_parameters(structure)
    for name, tensor in model.state_dict().items():
        assert torch.equal(*(slice_tensor(name, tensor, structure, plan) for plan in plans))
    scores = [
        score(model, structure, MagnitudeConfig(0.2, axes=kind, norm="l1"))[name]
        for kind, name in ((("mlp",), MLP), (("mlp", "expert_channels"), CHANNELS))
    ]
    torch.testing.assert_close(scores[1].view(4, 20).sum(0), scores[0])
    assert [axis.name for axis in selected_axes(structure, RandomConfig(0.2, axes=("mlp", "expert_channels")))] == [
        f"layers.{layer}.mlp.channels" for layer in range(2)
    ]
    with pytest.raises(PlanError, match=r"keeps channels of each expert, and of layers\.0\.mlp the"):
        make_plan(structure, {MLP: tied, CHANNELS: own}).check(structure)
    damaged = json.loads(plans[1].to_json())
    damaged["kept_indices"][CHANNELS] = "AAAA"
    with pytest.raises(PlanError, match="found 24 bits of kept units for 80 units"):
        PruningPlan.from_dict(damaged)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("policy_gradient", "prunenet")])
def test_methods_score_channels_of_each_expert(name):
    """Channels that change places within their experts, in each in another way, take their scores along."""
    model = copy.deepcopy(mixture("mixtral", torch.float32))
    structure, config = infer_structure(model), dataclasses.replace(METHODS[name], axes=("expert_channels",))
    before = score(model, structure, config, BATCHES)[CHANNELS].view(4, 20)
    orders = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(e)) for e in range(4)])
    experts = model.model.layers[0].mlp.experts
    for expert, order in enumerate(orders):
        both = torch.cat([order, 20 + order])
        experts.gate_up_proj.data[expert] = experts.gate_up_proj.data[expert][both]
        experts.down_proj.data[expert] = experts.down_proj.data[expert][:, order]
    after = score(model, structure, config, BATCHES)[CHANNELS].view(4, 20)
    torch.testing.assert_close(after, before.gather(1, orders), rtol=1e-3, atol=1e-7)
    assert before.std(1).min() > 0


def test_own_sets_are_better_than_tied_ones(tmp_path):
    """At the same width, by the same method, repaired alike; in steps, with whole experts; the same bits from disk."""
    dense = mixture("qwen2_moe", torch.float32)
    dense.save_pretrained(tmp_path / "dense")
    ids, errors = torch.cat([batch["input_ids"] for batch in BATCHES]), {}
    for kind in ("mlp", "expert_channels"):
        config = OBSConfig(0.15, axes=(kind,), protect=("*.shared_expert", "layers.0.*"))
        found = prune(dense, config, calibration=BATCHES)
        found.model.set_experts_implementation("eager")
        errors[kind] = (logits(found.model, ids) - logits(dense, ids)).square().mean().item()
    assert errors["expert_channels"] < 0.9 * errors["mlp"]
    config = LLMPrunerConfig(
        0.4, axes=("mlp", "expert_channels", "expert"), selection="obs", repair="least_squares", num_steps=2
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    wanted = prune(loaded, config, calibration=BATCHES)
    found = prune(tmp_path / "dense", config, calibration=BATCHES, layers_on="disk")
    assert any(name.endswith(".channels") for name in wanted.plan.kept_indices)
    assert found.plan.kept_indices == wanted.plan.kept_indices
    assert all(torch.equal(found.scores[name], values) for name, values in wanted.scores.items())
    for name, tensor in found.model.state_dict().items():
        assert tensor.is_meta or torch.equal(tensor, wanted.model.state_dict()[name])


def test_experts_that_saw_nothing_keep_the_units_of_the_plan():
    """And those that did choose by what they saw."""
    dense = mixture("mixtral", torch.float32)
    structure = infer_structure(dense)
    plan = make_plan(structure, {CHANNELS: structure.axes[CHANNELS].first(40)})
    batches = [{"input_ids": token_ids(1, 2)}]
    seen = [0] * 4

    def see(_, first, x):
        for expert, own in enumerate(x, first):
            seen[expert] += len(own)

    with eager_experts(dense), watching(dense, consumers_of(dense, structure, MLP), given=see):
        for batch in batches:
            dense(**batch)
    assert 0 in seen
    chosen = select_repairable(dense, structure, plan, batches).kept_indices[CHANNELS]
    for expert, count in enumerate(seen):
        own = [unit - 20 * expert for unit in chosen if unit // 20 == expert]
        assert len(own) == 10
        assert (own == list(range(10))) == (not count)


def test_rows_cannot_be_masked_in_experts():
    config = PolicyGradientConfig(0.2, axes=("expert_channels",), **LEARN)
    with pytest.raises(StructureError, match="is not a linear layer that sees one row after another"):
        prune(mixture("mixtral", torch.float32), config, calibration=BATCHES)
