"""Whole experts: the axis, its laws, what its masks mean, scores, and what is refused."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import random
import shutil
from typing import Any

import pytest
import torch
from models import VOCAB, logits, make_plan, shared_model, shared_structure, token_ids

import hf_prune
from hf_prune.allocation import allocate
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.config import LLMPrunerConfig, MagnitudeConfig, OBSConfig, PruningConfig, RandomConfig, REAPConfig
from hf_prune.errors import BudgetError, ConfigError, PlanError, StructureError
from hf_prune.latency import LatencyTable
from hf_prune.layers.masking import keep_mask, masked, masked_rows
from hf_prune.plan import PruningPlan
from hf_prune.recovery.gradual import check_maskable
from hf_prune.recovery.lora import add_adapters
from hf_prune.repair import repair_
from hf_prune.scores import METHODS, score
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_DEEPSEEK = {
    **{name: value for name, value in _SHAPE.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("num_local_experts", {**_SHAPE, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "num_experts",
        {
            **_SHAPE,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v3": ("n_routed_experts", _DEEPSEEK),
    "gpt_oss": ("num_local_experts", {**_SHAPE, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "llama4_text": (
        "num_local_experts",
        {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24},
    ),
}
families = pytest.mark.parametrize("family", SETTINGS)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5}
"""Some routers compute in float32 whatever the dtype of the model."""


def tiny(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = SETTINGS.get(family, SETTINGS["mixtral"])[1]
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**settings, **changes}))
        with torch.no_grad():
            for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("_bias"))):
                tensor.add_(0.2 * torch.randn_like(tensor))
    if family != "llama4_text":
        model.set_experts_implementation("batched_mm")
    return model.to(dtype).eval()


@functools.cache
def shared(family: str) -> tuple[Any, Any]:
    """One float64 model and its structure: do not change them."""
    model = tiny(family)
    return model, infer_structure(model)


def kept_experts(structure: Any, seed: int) -> dict[str, tuple[int, ...]]:
    """Another number of experts in each layer, from `least` on."""
    draw = random.Random(seed)
    axes = structure.axes_of("expert")
    widths = [axis.least + (i + seed) % (axis.num_units - axis.least) for i, axis in enumerate(axes)]
    return {a.name: tuple(sorted(draw.sample(range(a.num_units), w))) for a, w in zip(axes, widths, strict=True)}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# --- structure --------------------------------------------------------------------------------------------------------


@families
def test_an_expert_goes_with_its_rows_of_the_router(family):
    model, structure = shared(family)
    first = 1 if family == "deepseek_v3" else 0
    assert [axis.name for axis in structure.axes_of("expert")] == [f"layers.{i}.experts" for i in range(first, 3)]
    axis = structure.axes["layers.2.experts"]
    assert axis.num_units == getattr(model.config, SETTINGS[family][0])
    assert axis.least == model.config.num_experts_per_tok
    assert (axis.prunable, axis.exact, axis.branch) == (True, True, "mlp")
    path = f"{structure.layer_paths[2]}."
    members = {member.parameter.removeprefix(path).partition(".")[2] for member in structure.members[axis.name]}
    expected = {
        "mixtral": {"gate.weight"},
        "qwen2_moe": {"gate.weight"},
        "deepseek_v3": {"gate.weight", "gate.e_score_correction_bias"},
        "gpt_oss": {"router.weight", "router.bias", "experts.gate_up_proj_bias", "experts.down_proj_bias"},
        "llama4_text": {"router.weight"},
    }
    assert members == expected[family] | {"experts.gate_up_proj", "experts.down_proj"}


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_groups_of_experts_keep_equally_many_each(family):
    """Tokens choose groups, then experts in them: 3 in 2 of 4 groups, so that 2 of each group must stay."""
    changes = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
    model = tiny(family, **{**_DEEPSEEK, **changes})
    structure = infer_structure(model)
    axis = structure.axes_of("expert")[0]
    assert (axis.num_units, axis.num_blocks, axis.least, axis.num_chosen) == (12, 4, 2, 3)
    assert not axis.is_inner
    with pytest.raises(PlanError, match=r"keeps \[2, 3, 3, 3\] units of its blocks, expected equally many"):
        make_plan(structure, {axis.name: tuple(range(1, 12))}).check(structure)
    with pytest.raises(PlanError, match="keeps 4 experts, expected 8 or more"):
        make_plan(structure, {axis.name: (0, 3, 6, 9)}).check(structure)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor[::3] += 2.0  # groups are chosen for experts some of which will go
    result = hf_prune.prune(model, RandomConfig(1 / 3, axes=("expert",), budget="units"))
    assert len(result.plan.kept_indices[axis.name]) == 8
    assert result.model.config.n_routed_experts == 8
    with masked(model, structure, result.plan):
        expected = logits(model)
    torch.testing.assert_close(logits(result.model), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert (expected - logits(model)).abs().max() > 1e-3 * expected.abs().max()
    active = structure.num_parameters(budget="active")
    assert active == infer_structure(result.model).num_parameters(budget="active") + 4 * 32 * (
        len(structure.layer_paths) - 1
    )


def test_experts_that_are_chosen_as_maxima():
    model = tiny("phimoe")
    structure = infer_structure(model)
    plan = make_plan(structure, {"layers.1.experts": (0, 3), "layers.2.experts": (1, 2, 3)})
    assert {axis.least for axis in structure.axes_of("expert")} == {2}
    with masked(model, structure, plan):
        expected = logits(model)
    assert distance(logits(apply_plan(model, structure, plan)), expected) < 1e-6
    assert distance(logits(model), expected) > 1e-3


def test_positions_of_a_sequence_are_no_experts():
    from transformers import LlamaConfig

    assert not infer_structure(LlamaConfig(**_SHAPE)).axes_of("expert")


# --- laws -------------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("seed", [1, 2])
def test_removed_experts_are_as_if_never_chosen(family, seed):
    model, structure = shared(family)
    dense = logits(model)
    kept = kept_experts(structure, seed)
    if seed == 2:  # together with channels and heads
        kept |= {"layers.1.attention": (1,) if family != "deepseek_v3" else (0, 1, 3)}
        channels = next(axis for axis in structure.axes_of("mlp") if axis.layer == 2)
        kept[channels.name] = tuple(range(1, channels.num_units, 2))
    plan = make_plan(structure, kept)
    pruned = apply_plan(model, structure, plan)
    with masked(model, structure, plan):
        expected = logits(model)
    assert distance(logits(pruned), expected) < TOLERANCE[torch.float64]
    assert distance(expected, dense) > 1e-2
    assert torch.equal(logits(model), dense)
    assert sum(parameter.numel() for parameter in pruned.parameters()) == plan.num_parameters(structure)
    assert not pruned.config.pruning_config.get("surgery") or seed == 2
    assert PruningPlan.from_json(plan.to_json()) == plan


def greedy(model: Any, *, use_cache: bool) -> Any:
    with torch.no_grad():
        return model.generate(token_ids(1, 5), max_new_tokens=6, do_sample=False, use_cache=use_cache).tolist()


@families
def test_a_checkpoint_with_other_numbers_of_experts_loads_as_it_was_saved(family, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny(family, torch.float32)
    structure = infer_structure(model)
    name = SETTINGS[family][0]
    axes = structure.axes_of("expert")
    equal = {axis.name: tuple(range(1, axis.num_units)) for axis in axes}
    for folder, kept in (("free", kept_experts(structure, 1)), ("equal", equal)):
        pruned = apply_plan(model, structure, make_plan(structure, kept))
        save_pruned(pruned, tmp_path / folder)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        if family != "llama4_text":
            loaded.set_experts_implementation("batched_mm")
        assert distance(logits(loaded), logits(pruned)) < 1e-6
        state = pruned.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
        assert greedy(loaded, use_cache=True) == greedy(loaded, use_cache=False) == greedy(pruned, use_cache=True)
        again = infer_structure(loaded)
        found = {axis.name: axis.num_units for axis in again.axes_of("expert")}
        assert found == {name: len(units) for name, units in kept.items() if len(units) > 1}
    values = json.loads((tmp_path / "equal" / "config.json").read_text())
    own = values[name] if name in values else values["num_local_experts"]
    assert own == axes[0].num_units - 1
    assert "per_layer_config" not in values
    assert "auto_map" not in values


def test_plans_nest_and_keep_as_many_experts_as_tokens_are_sent_to():
    _, structure = shared("deepseek_v3")
    config = RandomConfig(0.2, axes=("expert", "mlp", "attention"), allocation="global", seed=3)
    axes = hf_prune.config.selected_axes(structure, config)
    generator = torch.Generator().manual_seed(0)
    scores = {axis.name: torch.rand(axis.num_units, generator=generator) for axis in axes}
    plans = [
        allocate(scores, structure, RandomConfig(r, axes=config.axes, allocation="global")) for r in (0.2, 0.4, 0.6)
    ]
    for less, more in itertools.pairwise(plans):
        for name, units in less.kept_indices.items():
            assert set(more.kept_indices.get(name, units)) <= set(units)
    assert any(name.endswith("experts") for name in plans[0].kept_indices)
    assert min(width for name, width in plans[-1].widths.items() if name.endswith("experts")) >= 3
    assert plans[1].achieved["decoder"] == pytest.approx(0.4, abs=0.1)


def test_equal_numbers_where_the_target_asks_for_them():
    _, structure = shared("mixtral")
    generator = torch.Generator().manual_seed(0)
    scores = {axis.name: torch.rand(6, generator=generator) * (1 + axis.layer) for axis in structure.axes_of("expert")}
    for targets, equal in (((), False), (("plain",), True), (("vllm",), True)):
        config = PruningConfig(0.4, axes=("expert",), allocation="global", targets=targets)
        plan = allocate(scores, structure, config)
        widths = [plan.widths[axis.name] for axis in structure.axes_of("expert")]
        assert (len(set(widths)) == 1) is equal, (targets, widths)


def test_a_plan_made_before_there_were_experts_still_fits():
    _, structure = shared("mixtral")
    plan = make_plan(structure, {"layers.0.attention": (1,)})
    values = plan.to_dict()
    values["num_units"] = {name: n for name, n in values["num_units"].items() if not name.endswith("experts")}
    PruningPlan.from_dict(values).check(structure)


def test_rows_of_a_batch_carry_their_own_experts():
    for family in ("mixtral", "deepseek_v3"):
        model, structure = shared(family)
        plans = [make_plan(structure, kept_experts(structure, seed)) for seed in (1, 2)]
        ids = token_ids()
        names = list(plans[0].kept_indices)
        with masked_rows(model, structure, names) as masks:
            for name in names:
                num_units = structure.axes[name].num_units
                masks[name] = torch.stack([keep_mask(num_units, plan.kept_indices[name]) for plan in plans])
            both = logits(model, ids)
        for row, plan in enumerate(plans):
            with masked(model, structure, plan):
                assert distance(both[row : row + 1], logits(model, ids[row : row + 1])) < 1e-6


# --- budgets ----------------------------------------------------------------------------------------------------------


def test_active_parameters_are_those_that_a_token_meets():
    model, structure = shared("mixtral")
    active = structure.num_parameters(budget="active")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert active == structure.num_parameters(budget="decoder") - experts * 4 // 6
    fewer = {axis.name: 4 for axis in structure.axes_of("expert")}
    assert active - structure.num_parameters(fewer, "active") == 2 * 32 * 3  # rows of the routers, nothing else
    scores = {a.name: torch.rand(a.num_units) for k in ("expert", "mlp") for a in structure.axes_of(k)}
    plan = allocate(scores, structure, PruningConfig(0.3, axes=("expert", "mlp"), budget="active"))
    assert plan.achieved["active"] == pytest.approx(0.3, abs=0.03)
    assert plan.achieved["active"] == pytest.approx(1 - plan.num_parameters(structure, "active") / active)


def test_a_latency_table_prices_experts_with_their_branch():
    _, structure = shared("mixtral")
    axes = {"experts": ((3, 0.0, 0.0),), "mlp": ((8, 0.3, 0.1),)}
    units = {axis.name: axis.num_units for axis in structure.axes.values() if axis.layer is not None}
    table = LatencyTable("mixtral", units, (2.0, 1.0), (0, 0, 0), ({},), (axes,), 1, 8, 8, "cpu", "float32", 1)
    assert table.predict({"layers.0.experts": 3}).total_s == 3.0
    assert table.seconds_per_unit("layers.0.experts", 6).max() == 0.0


# --- scores -----------------------------------------------------------------------------------------------------------


def by_hand(model: Any, batches: list[dict[str, torch.Tensor]], layer: int) -> dict[str, torch.Tensor]:
    """Number, sum and largest of gate times norm for each expert, from the weights."""
    block = model.model.layers[layer].mlp
    number, total, largest = torch.zeros(3, 6, dtype=torch.float64)
    inputs: list[torch.Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
        handle.remove()
        for x in torch.cat(inputs):
            gates = (x @ block.gate.weight.T).softmax(-1)
            best = gates.topk(2).indices
            for expert in best.tolist():
                gate, up = (block.experts.gate_up_proj[expert] @ x).chunk(2)
                output = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                value = float(gates[expert] / gates[best].sum() * output.norm())
                number[expert] += 1
                total[expert] += value
                largest[expert] = max(float(largest[expert]), value)
    return {"frequency": number, "sum": total, "max": largest, "mean": total / number.clamp_min(1)}


BATCHES = [{"input_ids": token_ids(2, 9, seed=seed)} for seed in (3, 4)]


def test_reap_is_the_mean_of_gate_times_norm():
    model, structure = shared("mixtral")
    expected = by_hand(model, BATCHES, 1)
    for criterion, values in expected.items():
        found = score(model, structure, REAPConfig(0.3, criterion=criterion), BATCHES)
        assert torch.allclose(found["layers.1.experts"].double(), values, rtol=1e-5), criterion
    assert float(expected["frequency"].sum()) == 2 * 2 * 2 * 9


def test_fisher_of_an_expert_is_that_of_its_gate():
    model, structure = shared("mixtral")
    config = LLMPrunerConfig(0.3, axes=("expert", "attention"))
    found = score(model, structure, config, BATCHES)
    weight = model.model.layers[1].mlp.experts.down_proj
    expected = torch.zeros(6, dtype=torch.float64)
    for ids in torch.cat([batch["input_ids"] for batch in BATCHES]):
        loss = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
        (gradient,) = torch.autograd.grad(loss, weight)  # the gate multiplies what `down_proj` gives
        expected += (weight * gradient).sum((1, 2)).detach().square() / 4
    assert torch.allclose(found["layers.1.experts"].double(), expected, rtol=1e-4)
    alone = score(model, structure, LLMPrunerConfig(0.3, axes=("attention",)), BATCHES)
    assert torch.equal(found["layers.1.attention"], alone["layers.1.attention"])


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_experts_are_scored_in_every_layer_they_are_in(family):
    model, structure = shared(family)
    for config in (
        REAPConfig(0.3),
        LLMPrunerConfig(0.3, axes=("expert",)),
        LLMPrunerConfig(0.3, axes=("expert",), criterion="first_order"),
        MagnitudeConfig(0.3, axes=("expert",)),
    ):
        found = score(model, structure, config, BATCHES)
        assert {name: len(values) for name, values in found.items()} == {
            axis.name: axis.num_units for axis in structure.axes_of("expert")
        }
        assert all(bool((values >= 0).all()) and float(values.max()) > 0 for values in found.values())


def test_on_disk_the_same_bits(tmp_path):
    model = tiny("mixtral", torch.float32)
    model.set_experts_implementation("grouped_mm")
    model.save_pretrained(tmp_path / "dense")
    ids = [{"input_ids": token_ids(4, 16)}]
    for config in (REAPConfig(0.2), LLMPrunerConfig(0.2, axes=("expert", "mlp"), repair="least_squares")):
        results = []
        for where in ("memory", "disk"):
            result = hf_prune.prune(
                str(tmp_path / "dense"), config, calibration=ids, layers_on=where, work_dir=tmp_path / where
            )
            save_pruned(result.model, tmp_path / f"{where}-pruned")
            results.append((result.plan, dict(_tensors(tmp_path / f"{where}-pruned"))))
            shutil.rmtree(tmp_path / where)
            shutil.rmtree(tmp_path / f"{where}-pruned")
        assert results[0][0] == results[1][0]
        assert any(name.endswith("experts") for name in results[0][0].kept_indices)
        assert results[0][1].keys() == results[1][1].keys()
        assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())


def _tensors(folder: Any) -> Any:
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


# --- repair and training ----------------------------------------------------------------------------------------------


def test_repair_fits_the_experts_that_stay_on_the_tokens_they_now_get():
    model = tiny("mixtral", torch.float32)
    structure = infer_structure(model)
    kept = {"layers.0.experts": (0, 2, 3, 5), "layers.1.experts": (1, 2, 4)}
    channels = {f"layers.{layer}.mlp": tuple(range(16)) for layer in (0, 1)}
    batches = [{"input_ids": token_ids(8, 32, seed=seed)} for seed in range(4)]
    plan = make_plan(structure, {**kept, **channels})
    pruned = apply_plan(model, structure, plan)
    before = copy.deepcopy(pruned.state_dict())
    found = repair_(pruned, model, structure, plan, batches)
    experts = {name: one for name, one in found.items() if "experts" in name}
    assert {name.rpartition("[")[2] for name in experts if "layers.1." in name} == {"0]", "1]", "2]"}
    assert all(one.error_after < one.error_before for one in experts.values())
    only = make_plan(structure, kept)
    pruned = apply_plan(model, structure, only)
    before = copy.deepcopy(pruned.state_dict())
    repair_(pruned, model, structure, only, batches)
    after = pruned.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in after if "experts" in n), "nothing was pruned before these"
    assert not torch.equal(
        before["model.layers.1.self_attn.o_proj.weight"], after["model.layers.1.self_attn.o_proj.weight"]
    )


@pytest.mark.parametrize(("family", "adds"), [("deepseek_v3", True), ("qwen2_moe", False)])
def test_a_shared_expert_makes_up_for_experts_that_went(family, adds):
    """Where the layer adds what it gives as it is: that of qwen2_moe is weighted by a gate of its own."""
    model = tiny(family, torch.float32)
    structure = infer_structure(model)
    plan = make_plan(structure, {"layers.1.experts": tuple(range(4))})
    batches = [{"input_ids": token_ids(8, 32, seed=seed)} for seed in range(4)]
    pruned = apply_plan(model, structure, plan)
    ids = batches[0]["input_ids"]

    def error() -> float:
        hidden = [m(input_ids=ids, output_hidden_states=True).hidden_states[2] for m in (model, pruned)]
        return float((hidden[0] - hidden[1]).square().sum())

    with torch.no_grad():
        before = error()
        found = repair_(pruned, model, structure, plan, batches)
        after = error()
    shared_experts = [one for name, one in found.items() if "shared" in name and "layers.1." in name]
    assert len(shared_experts) == 1
    if adds:
        assert after < 0.95 * before
        assert shared_experts[0].error_after < shared_experts[0].error_before
    else:
        assert shared_experts[0].error_before < 1e-6 * before


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_layers_with_other_numbers_of_experts_are_balanced_while_they_train(family):
    model = tiny(family, torch.float32)
    structure = infer_structure(model)
    pruned = apply_plan(model, structure, make_plan(structure, kept_experts(structure, 1))).train()
    widths = {layer.mlp.gate.weight.shape[0] for layer in pruned.model.layers}
    assert len(widths) > 1
    ids = token_ids()
    output = pruned(input_ids=ids, labels=ids, output_router_logits=True)
    assert output.aux_loss.isfinite()
    assert output.aux_loss >= 2  # top-k times 1 where all experts get equally many tokens
    output.loss.backward()
    for layer in pruned.model.layers:
        assert layer.mlp.gate.weight.grad.isfinite().all()
        assert float(layer.mlp.gate.weight.grad.abs().sum()) > 0


def test_adapters_of_layers_with_other_numbers_of_experts_merge():
    model = tiny("mixtral", torch.float32)
    structure = infer_structure(model)
    pruned = apply_plan(model, structure, make_plan(structure, kept_experts(structure, 1)))
    adapted = add_adapters(pruned, hf_prune.lora_config(pruned))
    ids = token_ids(4, 16)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    expected = logits(adapted.eval())
    merged = hf_prune.merge_adapters(adapted)
    assert distance(logits(merged), expected) < 1e-5
    assert {layer.mlp.experts.down_proj.shape[0] for layer in merged.model.layers} == {3, 4, 5}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_fewer_experts_than_a_token_is_sent_to_are_refused_before_work(monkeypatch):
    model, structure = shared("mixtral")
    plan = make_plan(structure, {"layers.1.experts": (2,)})
    with pytest.raises(PlanError, match=r"layers.1.experts: the plan keeps 1 experts, expected 2 or more"):
        apply_plan(model, structure, plan)

    def scores(*_: Any) -> Any:
        raise AssertionError("work began")

    monkeypatch.setitem(METHODS, "random", METHODS["random"].__class__(scores, False))
    with pytest.raises(BudgetError, match="out of reach"):
        hf_prune.prune(tiny("mixtral", torch.float32), RandomConfig(0.9, axes=("expert",)))


def test_what_cannot_score_or_mask_experts_says_so():
    model, structure = shared("mixtral")
    with pytest.raises(ConfigError, match="'expert'"):
        OBSConfig(0.3, axes=("expert",))
    with pytest.raises(ConfigError, match="all that 'reap' scores"):
        REAPConfig(0.3, axes=("expert", "mlp"))
    with pytest.raises(ConfigError, match="mode 'start'"):
        check_maskable(structure, RandomConfig(0.3, axes=("expert",)))
    with pytest.raises(StructureError, match="no operation consumes"):
        score(model, structure, hf_prune.WandaConfig(0.3, axes=("expert",)), BATCHES)
    llama, own = shared("llama4_text")
    with pytest.raises(StructureError, match="gates cannot be watched"):
        score(llama, own, REAPConfig(0.3), BATCHES)
    with pytest.raises(StructureError, match="no axis of kind 'expert'"):
        score(shared_model("llama"), shared_structure("llama"), REAPConfig(0.3), BATCHES)
