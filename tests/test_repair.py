"""Repair: the weights it gives have the least squared error, in every family, and nothing else changes."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
from collections import defaultdict

import pytest
import torch
from accelerate import dispatch_model
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    logits,
    make_plan,
    random_kept,
    shared_model,
    shared_structure,
    tiny_model,
    tiny_tokenizer,
    token_ids,
    write_text,
)
from transformers import AutoModelForCausalLM

from hf_prune import MagnitudeConfig, RandomConfig, apply_plan, prune
from hf_prune import plan as plans
from hf_prune.config import PruningConfig
from hf_prune.errors import CalibrationError, ConfigError, PlanError, StructureError
from hf_prune.layers.masking import masked
from hf_prune.layers.statistics import NO_REFIT, Statistics, best_ridge, solve_
from hf_prune.layers.walk import LayerCall, Walk, replaced_forward
from hf_prune.repair import repair_, select_repairable
from hf_prune.repair.end_to_end import RIDGE
from hf_prune.repair.preview import RepairPreview
from hf_prune.scores.elimination import removal_costs
from hf_prune.structure.consumers import only_consumer
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.slicing import renumber

TARGETS = ("own", "asymmetric", "residual")
NOT_ADDITIVE = ("gemma3_text", "glm4")  # a norm comes after the consumer


def calibration(num_batches=3, batch=4, length=24):
    return [{"input_ids": token_ids(batch, length, seed=seed)} for seed in range(num_batches)]


# --- the least-squares problem ----------------------------------------------------------------------------------------


def problem(seed, tokens, inputs, outputs):
    draw = torch.Generator().manual_seed(seed)
    x, t, w, b = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((tokens, inputs), (tokens, outputs), (outputs, inputs), (outputs,))
    )
    return x + 0.5, t - 0.3 + x[:, :1], w, b


def statistics_of(x, t, parts=1):
    statistics = Statistics(x.shape[1], t.shape[1], x.device)
    for some, wanted in zip(x.chunk(parts), t.chunk(parts), strict=True):
        statistics.add(some, wanted)
    return statistics


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("inputs", "parts"), [(1, 1), (3, 4), (17, 5)])
def test_without_ridge_it_is_lstsq(inputs, parts, with_bias):
    x, t, w, b = problem(0, 60, inputs, 4)
    found = solve_(statistics_of(x, t, parts), w, b if with_bias else None, ridge=0.0)
    known = torch.cat([x, torch.ones(60, 1, dtype=x.dtype)], 1) if with_bias else x
    wanted = torch.linalg.lstsq(known, t).solution.T
    torch.testing.assert_close(found.weight, wanted[:, :inputs])
    if with_bias:
        torch.testing.assert_close(found.bias, wanted[:, inputs])
    else:
        assert found.bias is None
    shift = b if with_bias else 0
    new_shift = found.bias if with_bias else 0
    assert found.error_before == pytest.approx(float((t - x @ w.T - shift).square().sum() / 60))
    assert found.error_after == pytest.approx(float((t - x @ found.weight.T - new_shift).square().sum() / 60))


@given(
    seed=st.integers(0, 1000),
    inputs=st.integers(1, 9),
    ridge=st.sampled_from([0.0, 1e-2, 1.0]),
    with_bias=st.booleans(),
)
def test_no_perturbation_lowers_the_error(seed, inputs, ridge, with_bias):
    x, t, w, b = problem(seed, 40, inputs, 3)
    bias = b if with_bias else None
    found = solve_(statistics_of(x, t), w, bias, ridge)
    centred = x - x.mean(0) if with_bias else x
    penalty = ridge * centred.square().sum(0).mean()

    def objective(weight, shift):
        error = t - x @ weight.T - (0 if shift is None else shift)
        return float(error.square().sum() + penalty * (weight - w).square().sum())

    best = objective(found.weight, found.bias)
    draw = torch.Generator().manual_seed(seed)
    for scale in (1e-3, 1e-1, 1.0):
        step = scale * torch.randn(w.shape, generator=draw, dtype=w.dtype)
        move = scale * torch.randn(b.shape, generator=draw, dtype=b.dtype)
        assert objective(found.weight + step, None if found.bias is None else found.bias + move) >= best
    assert best <= objective(w, bias) * (1 + 1e-9)
    error = t - x @ found.weight.T - (found.bias if with_bias else 0)
    assert found.error_after == pytest.approx(float(error.square().sum() / 40))


def test_a_singular_gram_matrix_gets_more_ridge():
    x, t, w, _ = problem(0, 5, 9, 3)
    found = solve_(statistics_of(x, t), w, None, ridge=0.0)
    assert found.ridge > 0
    assert found.weight.isfinite().all()
    assert found.error_after < 1e-3 * found.error_before


@pytest.mark.parametrize("columns", [1, 7, 512])
def test_solving_by_blocks(columns, monkeypatch):
    """Matrices are factorised in place, a few columns at a time; singular ones are restored, and get more ridge."""
    monkeypatch.setattr("hf_prune.layers.statistics._COLUMNS", columns)
    for tokens, ridge in ((60, 0.0), (60, 0.1), (12, 0.0)):  # of 12 tokens the matrix has rank 12, of 20
        x, t, w, _ = problem(0, tokens, 20, 17)
        for weight in (w, w.T.contiguous().T):
            before = weight.clone()
            found = solve_(statistics_of(x, t, 3), weight, None, ridge=ridge)
            assert torch.equal(weight, before)
            gram = x.T @ x
            ridged = gram + found.ridge * gram.diagonal().mean() * torch.eye(20, dtype=gram.dtype)
            wanted = w + torch.linalg.solve(ridged, x.T @ (t - x @ w.T)).T
            torch.testing.assert_close(found.weight, wanted, rtol=1e-5, atol=1e-6)
            for weights, error in ((w, found.error_before), (wanted, found.error_after)):
                assert error == pytest.approx(float((t - x @ weights.T).square().sum()) / tokens, rel=1e-6, abs=1e-6)
            assert found.ridge == ridge or (tokens == 12 and 0 < found.ridge <= 1e-7)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("inputs", [1, 5, 37])
def test_the_gram_matrix_is_whole(inputs, centred):
    x, t, _, _ = problem(0, 40, inputs, 3)
    found = statistics_of(x, t, 4).symmetric_gram(centred)
    known = x - x.mean(0) if centred else x
    torch.testing.assert_close(found, known.T @ known, rtol=1e-12, atol=1e-11)


def test_halves_are_added_up_in_float32():
    """Rounded to bfloat16 the sums would be off by more than a thousandth."""
    x, t, _, _ = problem(0, 400, 30, 5)
    x, t = x.bfloat16(), t.bfloat16()
    found, wanted = statistics_of(x, t, 4), statistics_of(x.double(), t.double(), 4)
    for name in ("gram", "cross", "inputs", "targets"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-3)
    assert found.squares == pytest.approx(wanted.squares, rel=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_error_of_any_weight(with_bias):
    x, t, w, b = problem(0, 60, 7, 4)
    sums, others = statistics_of(x[:40], t[:40]), statistics_of(x[40:], t[40:])
    error = (t - x @ w.T - (b if with_bias else 0)).square().sum(1)
    assert sums.error(w, b if with_bias else None) == pytest.approx(float(error[:40].mean()))
    sums.add_sums(others)
    assert sums.error(w, b if with_bias else None) == pytest.approx(float(error.mean()))


@pytest.mark.parametrize(("tokens", "least", "most"), [(40, 0.02, NO_REFIT), (4000, 0.01, 0.01)])
def test_the_ridge_is_the_one_that_others_gain_most_by(tokens, least, most):
    """Fitted to few tokens, a weight is held back; where there is nothing but noise to fit, it stays."""
    x, t, w, _ = problem(0, tokens + 2000, 30, 4)
    t = x @ (1.1 * w).T + 3 * (t - t.mean(0))
    parts = [statistics_of(x[own], t[own]) for own in (slice(tokens), slice(tokens, None))]
    ridge = best_ridge(*parts, w, None, 0.01)
    assert least <= ridge <= most
    errors = {
        one: parts[1].error(solve_(statistics_of(x[:tokens], t[:tokens]), w, None, one).weight, None)
        for one in (0.01, 0.04, 0.16, 0.64, 2.56)
    }
    assert errors.get(ridge, parts[1].error(w, None)) == min(*errors.values(), parts[1].error(w, None))
    noise = t - t.mean(0) + x @ w.T - x @ (1.1 * w).T
    parts = [statistics_of(x[own], (x @ w.T + noise)[own]) for own in (slice(40), slice(40, None))]
    assert best_ridge(*parts, w, None, 0.01) >= 0.16


def test_inputs_that_are_all_zero_change_nothing():
    x, t, w, _ = problem(0, 20, 4, 3)
    found = solve_(statistics_of(0 * x, t), w, None, ridge=1e-2)
    assert torch.equal(found.weight, w)


# --- every family -----------------------------------------------------------------------------------------------------


def linear_consumers(structure):
    """Layer → names of its 2-D consumers, attention first."""
    found = defaultdict(list)
    for kind in ("attention", "mlp"):
        for axis in structure.axes_of(kind):
            for member in structure.members[axis.name]:
                if member.role == "consumer" and len(structure.layouts[member.parameter]) == 2:
                    found[axis.layer].append(member.parameter)
    return found


class Watch:
    """Inputs and outputs of modules, `[tokens, channels]`, while a model runs."""

    def __init__(self, model, paths, swap=None):
        self.inputs, self.outputs = defaultdict(list), defaultdict(list)
        self.model, self.paths, self.swap = model, paths, swap or {}

    def run(self, batches):
        def before(path, module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if path in self.swap:
                hidden = self.swap[path][len(self.inputs[path])]
                args, kwargs = (hidden, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}
            self.inputs[path].append(hidden.clone())
            return args, kwargs

        def after(path, module, args, output):
            self.outputs[path].append((output[0] if isinstance(output, tuple) else output).clone())

        with contextlib.ExitStack() as stack, torch.no_grad():
            for path in self.paths:
                module = self.model.get_submodule(path)
                hook = lambda m, a, k, path=path: before(path, m, a, k)  # noqa: E731
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                hook = lambda m, a, o, path=path: after(path, m, a, o)  # noqa: E731
                stack.callback(module.register_forward_hook(hook).remove)
            for batch in batches:
                self.model(input_ids=batch["input_ids"], use_cache=False)
        return self


def rows(values):
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in values])


def check_optimal(family, plan, target, dense, repaired, structure, batches):
    """What each repaired consumer still lacks has no part that its inputs could explain."""
    consumers = linear_consumers(structure)
    layers = structure.layer_paths
    modules = [name.rpartition(".")[0] for found in consumers.values() for name in found]

    def new(path):
        layer = next(i for i, p in enumerate(layers) if f"{path}.".startswith(f"{p}."))
        return renumber(path, layer, structure, plan)

    kept_layers = [p for i, p in enumerate(layers) if i not in plan.removed_layers]
    there = dict(repaired.named_modules())
    stays = [m for m in modules if new(m) in there and any(m.startswith(f"{path}.") for path in kept_layers)]
    pruned = Watch(repaired, [new(path) for path in (*stays, *kept_layers)]).run(batches)
    checked = 0
    for layer, path in enumerate(layers):
        if layer in plan.removed_layers:
            continue
        arrived = pruned.inputs[new(path)]
        own = Watch(dense, [path, *modules], {path: arrived} if target == "own" else None).run(batches)
        missing = rows(own.inputs[path]) - rows(arrived)
        for name in consumers[layer]:
            module = name.rpartition(".")[0]
            if module not in stays:
                missing = missing + rows(own.outputs[module])
                continue
            x, got, wanted = (
                rows(v) for v in (pruned.inputs[new(module)], pruned.outputs[new(module)], own.outputs[module])
            )
            if target == "residual" and family not in NOT_ADDITIVE:
                lacks = wanted + missing - got
                missing = lacks
            else:
                lacks = wanted - got
            scale = float((x.T @ wanted).norm())
            assert float((x.T @ lacks).norm()) < 1e-7 * scale, name
            if getattr(repaired.get_submodule(new(module)), "bias", None) is not None:
                assert float(lacks.sum(0).norm()) < 1e-7 * float(wanted.abs().sum()), name
            checked += 1
    return checked


LINEAR_FAMILIES = (
    "llama", "qwen2", "gemma3_text", "phi3", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "glm4",
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "target"),
    [(family, "residual") for family in LINEAR_FAMILIES]
    + [(family, target) for family in ("llama", "gpt2", "gpt_neox", "gemma3_text") for target in TARGETS[:2]],
)
def test_every_consumer_is_optimal_on_what_the_repaired_layers_before_it_give(family, target):
    dense, structure, batches = shared_model(family), shared_structure(family), calibration()
    plan = make_plan(structure, random_kept(structure, random.Random(3)))
    pruned = apply_plan(dense, structure, plan)
    before = distance(dense, pruned)
    found = repair_(pruned, dense, structure, plan, batches, target=target, ridge=0.0)
    assert check_optimal(family, plan, target, dense, pruned, structure, batches) >= len(found) > 0
    assert all(0 <= item.error_after <= item.error_before + 1e-9 for item in found.values())
    assert all(item.ridge < 1e-6 for item in found.values())  # above 0 where a unit of opt is always 0
    assert distance(dense, pruned) < 0.9 * before


def distance(dense, pruned):
    ids = token_ids(4, 24, seed=0)
    return float((logits(pruned, ids) - logits(dense, ids)).norm())


@pytest.mark.parametrize(
    "kept",
    [
        {"layers": (0, 2), "layers.2.mlp": tuple(range(20))},
        {"layers.attention": (0, 2), "layers.0.mlp": tuple(range(30))},
        {"layers.mlp": (1, 2)},
    ],
    ids=["layer", "attention", "mlp"],
)
@pytest.mark.parametrize("target", TARGETS)
def test_layers_after_a_removed_one_are_optimal(kept, target):
    dense, structure, batches = shared_model("llama"), shared_structure("llama"), calibration()
    plan = make_plan(structure, kept)
    pruned = apply_plan(dense, structure, plan)
    before = distance(dense, pruned)
    repair_(pruned, dense, structure, plan, batches, target=target, ridge=0.0)
    assert check_optimal("llama", plan, target, dense, pruned, structure, batches) >= 4
    assert target == "own" or distance(dense, pruned) < before


@pytest.mark.parametrize("target", ["asymmetric", "residual"])
def test_pruned_hidden_channels_are_made_up_for(target):
    dense, structure, batches = shared_model("llama"), shared_structure("llama"), calibration()
    plan = make_plan(structure, random_kept(structure, random.Random(1), ("mlp", "hidden")))
    pruned = apply_plan(dense, structure, plan)
    before = distance(dense, pruned)
    found = repair_(pruned, dense, structure, plan, batches, target=target)
    assert len(found) == 6
    assert distance(dense, pruned) < before


def test_experts_are_optimal_on_the_tokens_routed_to_them():
    dense, structure, batches = shared_model("mixtral"), shared_structure("mixtral"), calibration()
    kept = {"layers.0.mlp": tuple(range(0, 40, 2)), "layers.1.mlp": tuple(range(3, 33))}
    plan = make_plan(structure, kept)
    pruned = apply_plan(dense, structure, plan)
    before = distance(dense, pruned)
    found = repair_(pruned, dense, structure, plan, batches, target="own", ridge=0.0)
    assert distance(dense, pruned) < before
    for layer in range(2):
        path = f"model.layers.{layer}.mlp"
        arrived = rows(Watch(pruned, [path]).run(batches).inputs[path])
        experts, units = dense.get_submodule(path).experts, list(kept[f"layers.{layer}.mlp"])
        _, _, chosen = pruned.get_submodule(path).gate(arrived)
        for expert in range(4):
            z = arrived[(chosen == expert).any(1)]
            gate, up = (z @ experts.gate_up_proj[expert].T).chunk(2, -1)
            x = torch.nn.functional.silu(gate) * up
            weight = pruned.get_submodule(path).experts.down_proj[expert]
            wanted = x @ experts.down_proj[expert].T
            lacks = wanted - x[:, units] @ weight.T
            assert float((x[:, units].T @ lacks).detach().norm()) < 1e-7 * float(
                (x[:, units].T @ wanted).detach().norm()
            )
            error = found[f"{path}.experts.down_proj[{expert}]"].error_after
            assert error == pytest.approx(float(lacks.detach().square().sum() / len(z)))


def test_an_expert_that_saw_few_tokens_stays_as_it_is(caplog):
    dense, structure = shared_model("mixtral"), shared_structure("mixtral")
    plan = make_plan(structure, {"layers.0.mlp": tuple(range(30))})
    pruned = apply_plan(dense, structure, plan)
    before = {name: p.clone() for name, p in pruned.named_parameters()}
    with caplog.at_level(logging.WARNING, "hf_prune"):
        repair_(pruned, dense, structure, plan, [{"input_ids": token_ids(1, 3)}])
    assert "experts [0, 1, 2, 3] saw fewer than 8 tokens" in caplog.text
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(pruned.get_parameter(name), before[name])


# --- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("target", TARGETS)
def test_what_comes_before_all_pruned_units_keeps_its_bits(family, target):
    dense, structure = shared_model(family), shared_structure(family)
    last = len(structure.layer_paths) - 1
    num_units = structure.axes[f"layers.{last}.mlp"].num_units
    plan = make_plan(structure, {f"layers.{last}.mlp": tuple(range(num_units // 2))})
    pruned = apply_plan(dense, structure, plan)
    before = {name: p.clone() for name, p in pruned.state_dict().items()}
    repair_(pruned, dense, structure, plan, calibration(), target=target)
    changed = {name for name, p in pruned.state_dict().items() if not torch.equal(p, before[name])}
    consumers = {m.parameter for m in structure.members[f"layers.{last}.mlp"] if m.role == "consumer"}
    assert consumers <= changed
    assert changed - consumers <= {name.replace(".weight", ".bias") for name in consumers}


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_a_plan_that_keeps_all_changes_no_bit(family):
    dense, structure = shared_model(family), shared_structure(family)
    plan = make_plan(structure, {})
    pruned = apply_plan(dense, structure, plan)
    assert repair_(pruned, dense, structure, plan, calibration()) == {}
    assert all(torch.equal(p, dense.state_dict()[name]) for name, p in pruned.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_nothing_but_consumers_changes_and_the_models_are_left_as_they_were(family):
    dense, structure = tiny_model(family), shared_structure(family)
    plan = make_plan(structure, random_kept(structure, random.Random(0)))
    pruned = apply_plan(dense, structure, plan)
    dense.train()
    first = {name: p.clone() for name, p in dense.state_dict().items()}
    before = {name: p.clone() for name, p in pruned.state_dict().items()}
    random_state = torch.get_rng_state()
    found = repair_(pruned, dense, structure, plan, calibration())
    assert all(torch.equal(p, first[name]) for name, p in dense.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert dense.training
    assert not pruned.training
    for model in (dense, pruned):
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
    consumers = {name.partition("[")[0] for name in found}
    consumers |= {name.replace(".weight", ".bias") for name in consumers}
    assert {name for name, p in pruned.state_dict().items() if not torch.equal(p, before[name])} <= consumers


def repaired(batches, dtype=torch.float64, dense=None, **options):
    structure = shared_structure("llama")
    dense = dense or (shared_model("llama") if dtype == torch.float64 else tiny_model("llama", dtype=dtype))
    plan = make_plan(structure, random_kept(structure, random.Random(5)))
    pruned = apply_plan(dense, structure, plan)
    repair_(pruned, dense, structure, plan, batches, **options)
    return pruned


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_each_projection_computes_each_batch_once(family):
    dense, structure, batches = shared_model(family), shared_structure(family), calibration()
    pruned = apply_plan(dense, structure, plan := make_plan(structure, random_kept(structure, random.Random(3))))
    counts = defaultdict(int)
    with contextlib.ExitStack() as stack:
        for which, model in (("dense", dense), ("pruned", pruned)):
            weights = {
                member.parameter
                for axis in structure.axes.values()
                if axis.layer is not None
                for member in structure.members[axis.name]
            }
            for path in {name.rpartition(".")[0] for name in weights}:
                count = lambda module, args, output, key=(which, path): counts.update({key: counts[key] + 1})  # noqa: E731
                stack.callback(model.get_submodule(path).register_forward_hook(count).remove)
        repair_(pruned, dense, structure, plan, batches)
    for (which, _), count in counts.items():
        assert count == len(batches) + (which == "dense")  # once to see how the layers are called


def test_it_does_not_depend_on_the_batch_size_and_gives_the_same_bits_again():
    ids = torch.cat([batch["input_ids"] for batch in calibration()])
    large = repaired([{"input_ids": ids}])
    again = repaired([{"input_ids": ids}])
    small = repaired([{"input_ids": part} for part in ids.split(5)])
    for name, p in large.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
        torch.testing.assert_close(p, small.get_parameter(name))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.15)])
def test_weights_keep_their_dtype(dtype, tolerance):
    exact, rounded = repaired(calibration()), repaired(calibration(), dtype)
    assert all(p.dtype == dtype for p in rounded.parameters())
    wanted, found = (logits(model, token_ids(4, 24)).double() for model in (exact, rounded))
    assert float((found - wanted).norm()) < tolerance * float(wanted.norm())


def test_a_dense_model_with_offloaded_layers_gives_the_same(tmp_path):
    structure = shared_structure("llama")
    dense = tiny_model("llama")
    plan = make_plan(structure, random_kept(structure, random.Random(5)))
    pruned = apply_plan(dense, structure, plan)
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    dispatch_model(dense, where, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert any(p.is_meta for p in dense.parameters())
    repair_(pruned, dense, structure, plan, calibration())
    for name, p in repaired(calibration()).named_parameters():
        torch.testing.assert_close(pruned.get_parameter(name), p)


def test_a_replaced_forward_is_given_back():
    module = torch.nn.Linear(2, 2)
    with replaced_forward(module, lambda x: x):
        assert module(1) == 1
    assert "forward" not in module.__dict__
    module.forward = own = lambda x: x + 1  # as accelerate's hooks do
    with replaced_forward(module, lambda x: x):
        assert module(1) == 1
    assert module.forward is own


def test_layers_that_add_in_place_do_not_change_what_is_kept():
    class Adds(torch.nn.Module):
        def forward(self, hidden_states):
            return hidden_states.add_(1)

    stream = Walk(torch.nn.Sequential(Adds()), ["0"])
    stream.calls = [[LayerCall((), {})]]
    hidden = torch.zeros(1, 2, 3)
    assert torch.equal(stream.run(0, 0, hidden), hidden + 1)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_anything_changes():
    structure, dense = shared_structure("llama"), tiny_model("llama")
    plan = make_plan(structure, {"layers.0.mlp": tuple(range(10)), "layers.2.mlp": tuple(range(10))})
    hidden = make_plan(structure, {"hidden": tuple(range(40))})
    pruned = apply_plan(dense, structure, plan)
    before = {name: p.clone() for name, p in pruned.state_dict().items()}
    ids = token_ids(2, 8)
    padded = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    for batches, error, words in (
        ([], CalibrationError, "no calibration batch"),
        ([padded], CalibrationError, "padding"),
    ):
        with pytest.raises(error, match=words):
            repair_(pruned, dense, structure, plan, batches)
    with pytest.raises(PlanError, match="own"):
        repair_(apply_plan(dense, structure, hidden), dense, structure, hidden, calibration(), target="own")
    with pytest.raises(PlanError, match="this model has"):
        repair_(pruned, dense, structure, make_plan(shared_structure("llama_tied"), {}), calibration())
    handle = dense.model.layers[1].register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    with pytest.raises(StructureError, match="hand on more than hidden states"):
        repair_(pruned, dense, structure, plan, calibration())
    handle.remove()
    with torch.no_grad():
        dense.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        repair_(pruned, dense, structure, plan, calibration())
    assert all(torch.equal(p, before[name]) for name, p in pruned.state_dict().items())


def test_the_config_says_how_and_is_checked():
    config = MagnitudeConfig(0.3, repair="least_squares", repair_target="own", repair_ridge=0.1)
    assert MagnitudeConfig.from_json(config.to_json()) == config
    for wrong in (
        {"repair": "lstsq"},
        {"repair_target": "dense"},
        {"repair_ridge": -1.0},
        {"repair_ridge": float("nan")},
        {"repair": "least_squares", "repair_target": "own", "axes": ("mlp", "hidden")},
        {"repair": "data_free", "axes": ("mlp", "hidden")},
        {"repair": "end_to_end", "repair_target": "own"},
        {"repair": "all", "repair_target": "own"},
    ):
        with pytest.raises(ConfigError, match="repair"):
            MagnitudeConfig(0.3, **wrong)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_training_lessens_the_error_of_layers_on_held_out_batches(family):
    dense, structure, batches = tiny_model(family, dtype=torch.float32), shared_structure(family), calibration(8, 2, 16)
    plan = make_plan(structure, {"layers.1.mlp": tuple(range(0, 30, 2)), "layers.2.attention": (1,)})
    fitted, trained, again = (apply_plan(dense, structure, plan) for _ in range(3))
    repair_(fitted, dense, structure, plan, batches)
    frozen = trained.get_parameter(
        next(name for name, _ in trained.named_parameters() if "layernorm" in name or "ln_" in name)
    )
    frozen.requires_grad_(False)
    found = repair_(trained, dense, structure, plan, batches, train=True)
    repair_(again, dense, structure, plan, batches, train=True)
    layers = {name: item for name, item in found.items() if name in structure.layer_paths}
    assert set(layers) == set(structure.layer_paths[1:])  # the first layer is as it was
    assert all(item.error_after <= item.error_before for item in layers.values())
    assert layers[structure.layer_paths[1]].error_after < layers[structure.layer_paths[1]].error_before
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in trained.named_parameters())
    path = f"{structure.layer_paths[0]}."
    assert all(
        torch.equal(p, dense.get_parameter(name)) for name, p in trained.named_parameters() if name.startswith(path)
    )
    assert not frozen.requires_grad
    assert sum(not p.requires_grad for p in trained.parameters()) == 1
    assert all(p.grad is None for p in trained.parameters())
    assert distance(dense, trained) < distance(dense, fitted)


def test_training_keeps_dtypes_and_needs_two_batches():
    dense, structure = tiny_model("llama", dtype=torch.bfloat16), shared_structure("llama")
    plan = make_plan(structure, {"layers.1.mlp": tuple(range(20))})
    pruned = apply_plan(dense, structure, plan)
    found = repair_(pruned, dense, structure, plan, calibration(4), train=True)
    assert all(p.dtype == torch.bfloat16 for p in pruned.parameters())
    assert found["model.layers.1"].error_after < found["model.layers.1"].error_before
    with pytest.raises(CalibrationError, match="found 1 calibration batch, expected 2"):
        repair_(pruned, dense, structure, plan, calibration(1), train=True)


# --- end to end -------------------------------------------------------------------------------------------------------


def divergences(dense, pruned, ids):
    known, logits = dense(input_ids=ids).logits.log_softmax(-1), pruned(input_ids=ids).logits.log_softmax(-1)
    return (known.exp() * (known - logits)).sum(-1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_step_end_to_end_is_the_natural_gradient_of_the_divergence(family):
    dense, structure, batches = tiny_model(family), shared_structure(family), calibration(3)
    batches[1] = {"input_ids": token_ids(2, 2 * batches[1]["input_ids"].shape[1], seed=9)}  # each token counts alike
    batches.append(batches[0])  # of random tokens the held-out ones say nothing of others
    plan = make_plan(structure, {"layers.0.mlp": tuple(range(0, 30, 2)), "layers.1.attention": (1,)})
    fitted, stepped = (apply_plan(dense, structure, plan) for _ in range(2))
    repair_(fitted, dense, structure, plan, batches)
    repair_(stepped, dense, structure, plan, batches, end_to_end=True)
    moved = {n: p - stepped.get_parameter(n) for n, p in fitted.named_parameters()}
    moved = {name: move for name, move in moved.items() if move.count_nonzero()}
    linear = [axis.name for axis in structure.axes.values() if axis.layer is not None and axis.kind == "attention"]
    if family != "mixtral":  # experts have routers between them and the prediction, and stay as they are
        linear += [axis.name for axis in structure.axes.values() if axis.layer is not None and axis.kind == "mlp"]
    assert set(moved) == {only_consumer(dense, structure, name).parameter for name in linear}
    seen = {name: [] for name in moved}
    with contextlib.ExitStack() as stack:
        for name, own in seen.items():
            module = fitted.get_submodule(name.rpartition(".")[0])
            keep = lambda _, args, output, own=own: own.append((args[0], output, output.retain_grad()))  # noqa: E731
            stack.callback(module.register_forward_hook(keep).remove)
        total = sum(divergences(dense, fitted, batch["input_ids"])[:, :-1].sum() for batch in batches[:-1])
    total.backward()
    sizes = []
    for name, move in moved.items():
        x = torch.cat([inputs.flatten(0, -2) for inputs, _, _ in seen[name]]).detach()
        g = torch.cat([output.grad.flatten(0, -2) for _, output, _ in seen[name]])
        ridge = RIDGE * x.square().mean() * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        step = torch.linalg.solve(x.T @ x + ridge, x.T @ g) / g.square().mean()
        move = move if step.shape == move.shape and family == "gpt2" else move.T
        torch.testing.assert_close(move / move.norm(), step / step.norm(), rtol=1e-4, atol=1e-6)
        sizes.append(float(move.norm() / step.norm()))
    assert max(sizes) == pytest.approx(min(sizes), rel=1e-4)
    with torch.no_grad():
        before, after = (divergences(dense, model, batches[-1]["input_ids"]).mean() for model in (fitted, stepped))
    assert after < before


def test_a_step_end_to_end_that_held_out_text_does_not_gain_by_is_not_taken(monkeypatch):
    dense, structure, batches = shared_model("llama"), shared_structure("llama"), calibration(3)
    plan = make_plan(structure, {"layers.1.mlp": tuple(range(20))})
    fitted, stepped = (apply_plan(dense, structure, plan) for _ in range(2))
    repair_(fitted, dense, structure, plan, batches)
    monkeypatch.setattr("hf_prune.repair.end_to_end.FIRST_STEP", 1e3)
    repair_(stepped, dense, structure, plan, batches, end_to_end=True)
    assert all(torch.equal(p, fitted.get_parameter(name)) for name, p in stepped.named_parameters())
    with pytest.raises(CalibrationError, match="found 1 calibration batch, expected 2"):
        repair_(stepped, dense, structure, plan, batches[:1], end_to_end=True)


@pytest.mark.parametrize("repair", ["train", "end_to_end", "all"])
def test_too_few_batches_are_named_before_anything_is_scored(repair, monkeypatch):
    monkeypatch.setattr("hf_prune.pipeline.score", lambda *args, **kwargs: pytest.fail("scored"))
    with pytest.raises(CalibrationError, match="found 1 calibration batch, expected 2"):
        prune(shared_model("llama"), MagnitudeConfig(0.3, repair=repair), calibration=calibration(1))


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repair", "parts"),
    [("least_squares", ()), ("train", ("train",)), ("end_to_end", ("end_to_end",)), ("all", ("train", "end_to_end"))],
)
def test_a_config_says_what_repair_does(repair, parts):
    dense, structure, batches = shared_model("llama"), shared_structure("llama"), calibration(3)
    batches.append(batches[0])  # of random tokens the held-out ones say nothing of others
    found = prune(dense, MagnitudeConfig(0.3, repair=repair), calibration=batches)
    wanted, least = (apply_plan(dense, structure, found.plan) for _ in range(2))
    repair_(wanted, dense, structure, found.plan, batches, **dict.fromkeys(parts, True))
    repair_(least, dense, structure, found.plan, batches)
    assert all(torch.equal(p, wanted.get_parameter(name)) for name, p in found.model.named_parameters())
    assert bool(parts) != all(torch.equal(p, least.get_parameter(name)) for name, p in found.model.named_parameters())


def test_repair_needs_calibration_whatever_the_method():
    with pytest.raises(CalibrationError, match="repair 'least_squares' needs calibration"):
        prune(shared_model("llama"), RandomConfig(0.3, repair="least_squares"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_repair_without_data_leaves_less_error_on_noise_and_on_text(family):
    dense, structure = shared_model(family), shared_structure(family)
    kept = {"layers.0.mlp": tuple(range(structure.axes["layers.0.mlp"].num_units // 2))}
    plan = make_plan(structure, kept)
    plain, pruned, again, other = (apply_plan(dense, structure, plan) for _ in range(4))
    found = repair_(pruned, dense, structure, plan, None)
    assert all(
        item.error_after < item.error_before
        for name, item in found.items()
        if name.startswith(structure.layer_paths[0])
    )
    repair_(again, dense, structure, plan, None, target="residual")
    repair_(other, dense, structure, plan, None, seed=1)
    name = next(iter(found)).partition("[")[0]
    assert torch.equal(pruned.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(pruned.get_parameter(name), other.get_parameter(name))
    errors = []
    for model in (plain, pruned):
        texts = {"dense": dense, "pruned": model}
        path = structure.layer_paths[0]
        outputs = {key: rows(Watch(own, [path]).run(calibration()).outputs[path]) for key, own in texts.items()}
        errors.append(float((outputs["dense"] - outputs["pruned"]).norm()))
    assert errors[1] < errors[0]
    assert prune(dense, RandomConfig(0.3, repair="data_free")).plan.config.repair == "data_free"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prune_repairs_and_the_checkpoint_loads_with_the_same_logits(family, tmp_path):
    text = write_text(tmp_path / "text.txt")
    dense, tokenizer = shared_model(family), tiny_tokenizer(text)
    settings = {"num_samples": 12, "seq_len": 24}
    result = prune(dense, RandomConfig(0.3, repair="least_squares", **settings), tokenizer=tokenizer, calibration=text)
    plain = prune(dense, RandomConfig(0.3))
    assert result.plan.kept_indices == plain.plan.kept_indices
    assert distance(dense, result.model) < distance(dense, plain.model)
    result.model.save_pretrained(tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float64)
    torch.testing.assert_close(logits(loaded), logits(result.model))
    saved = loaded.config.pruning_config
    assert saved["settings"]["repair"] == "least_squares"


# --- selection for repair ---------------------------------------------------------------------------------------------


def repaired_error(x, w, entries):
    """Σ |W x − W' x_K|² for the best W'."""
    wanted = x @ w.T
    best = torch.linalg.lstsq(x[:, entries], wanted).solution
    return float((wanted - x[:, entries] @ best).square().sum())


@given(seed=st.integers(0, 1000), size=st.sampled_from([1, 2]))
@settings(max_examples=20)
def test_elimination_removes_the_unit_that_repair_makes_up_for_best(seed, size):
    x, _, w, _ = problem(seed, 60, 6 * size, 3)
    units = torch.arange(6).repeat_interleave(size)
    entries = lambda kept: torch.nonzero(torch.isin(units, torch.tensor(sorted(kept))))[:, 0]  # noqa: E731
    wanted = set(range(6))
    for width in (5, 4, 3):  # greedy, one at a time, each time measured by least squares
        gone = min(wanted, key=lambda unit: repaired_error(x, w, entries(wanted - {unit})))
        wanted.remove(gone)
        costs = removal_costs([x.T @ x], [w], units, width, ridge=0.0)
        assert set(torch.nonzero(costs.isinf())[:, 0].tolist()) == wanted


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_selection_keeps_the_widths(family):
    dense, structure, batches = shared_model(family), shared_structure(family), calibration()
    plan = make_plan(structure, random_kept(structure, random.Random(3)))
    chosen = select_repairable(dense, structure, plan, batches)
    assert chosen.widths == plan.widths
    assert chosen == select_repairable(dense, structure, plan, batches)
    assert chosen.kept_indices != plan.kept_indices


@pytest.mark.parametrize(("family", "axis"), [("llama", "mlp"), ("gpt2", "mlp"), ("gpt2", "attention")])
def test_selected_units_leave_less_error_than_others(family, axis):
    dense, structure, batches = shared_model(family), shared_structure(family), calibration()
    num_units = structure.axes[f"layers.0.{axis}"].num_units
    draw, errors = random.Random(0), []
    plans = [
        make_plan(structure, {f"layers.0.{axis}": tuple(sorted(draw.sample(range(num_units), num_units // 2)))})
        for _ in range(4)
    ]
    for plan in (*plans, select_repairable(dense, structure, plans[0], batches)):
        pruned = apply_plan(dense, structure, plan)
        found = repair_(pruned, dense, structure, plan, batches, target="asymmetric")
        errors.append(next(iter(found.values())).error_after)
    assert errors[-1] < min(errors[:-1])


def test_prune_selects_for_repair():
    dense, batches = shared_model("llama"), calibration()
    plain = prune(dense, RandomConfig(0.5))
    found = prune(dense, RandomConfig(0.5, selection="obs", repair="least_squares"), calibration=batches)
    assert found.plan.widths == plain.plan.widths
    assert found.plan.kept_indices != plain.plan.kept_indices
    with pytest.raises(CalibrationError, match="selection 'obs' needs calibration"):
        prune(dense, RandomConfig(0.5, selection="obs"))
    with pytest.raises(CalibrationError, match="no calibration batch"):
        select_repairable(dense, shared_structure("llama"), plain.plan, [])
    with pytest.raises(ConfigError, match="selection"):
        RandomConfig(0.5, selection="best")


# --- preview ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_preview_is_the_least_squares_weight_on_dense_inputs(family):
    model = tiny_model(family).double()
    structure = infer_structure(model)
    batches = [{"input_ids": torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(3))}]
    plan = plans.make_plan(structure, {"layers.1.mlp": tuple(range(0, 40, 3))}, PruningConfig(0.3), None)
    transposed = family == "gpt2"
    path = "transformer.h.1.mlp.c_proj" if transposed else "model.layers.1.mlp.down_proj"
    module, seen = model.get_submodule(path), []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    model.eval()(**batches[0])
    handle.remove()
    before = module.weight.detach().clone()
    weight = before.T if transposed else before
    kept = list(plan.kept_indices["layers.1.mlp"])
    expected = torch.linalg.lstsq(seen[0][:, kept], seen[0] @ weight.T).solution.T
    preview = RepairPreview(model, structure, batches, ridge=0.0)
    with preview.applied(plan):
        found = module.weight.T if transposed else module.weight
        torch.testing.assert_close(found[:, kept], expected, rtol=1e-6, atol=1e-8)
        gone = [unit for unit in range(found.shape[1]) if unit not in kept]
        assert not found[:, gone].any()
    assert torch.equal(module.weight, before)


def test_preview_takes_the_ridge_that_holds_on_other_windows():
    """With hardly more tokens than inputs a small ridge fits them, and what it gives is worse on others."""
    model = tiny_model("llama").double()
    structure = infer_structure(model)
    ids = torch.randint(0, 96, (80, 8), generator=torch.Generator().manual_seed(3))
    plan = plans.make_plan(structure, {"layers.1.mlp": tuple(range(0, 40, 3))}, PruningConfig(0.3), None)
    module, seen = model.model.layers[1].mlp.down_proj, []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, -2)))
    model.eval()(input_ids=ids[16:])  # none of which it is fitted to
    handle.remove()
    before, inputs = module.weight.detach().clone(), seen[0]
    errors = {}
    for name, ridge in (("asked", 0.0), ("chosen", 1e-8), ("none", 1e12)):
        batches = [{"input_ids": part} for part in ids[:16].split(5)]  # of which windows 7 and 15 are held out
        with RepairPreview(model, structure, batches, ridge=ridge).applied(plan):
            errors[name] = float((inputs @ (module.weight - before).T).square().sum())
    assert errors["chosen"] < min(errors["asked"], errors["none"])
    few = [{"input_ids": ids[:7]}]  # none to hold out
    with RepairPreview(model, structure, few, ridge=1e-8).applied(plan):
        weight = module.weight.detach().clone()
    with RepairPreview(model, structure, few, ridge=0.0).applied(plan):
        torch.testing.assert_close(weight, module.weight, rtol=1e-4, atol=1e-5)


def test_plans_are_not_judged_by_what_the_preview_is_fitted_to(monkeypatch):
    fitted = []
    preview = sys.modules["hf_prune.pipeline"].RepairPreview
    monkeypatch.setattr(
        sys.modules["hf_prune.pipeline"],
        "RepairPreview",
        lambda model, structure, batches, *rest: (
            fitted.append(torch.cat(list(batches))),
            preview(model, structure, batches, *rest),
        )[1],
    )
    ids = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(3))
    batches = [{"input_ids": part} for part in ids.split(3)]
    for samples in (4, 8):  # where all windows judge, all are fitted to
        config = MagnitudeConfig(0.4, allocation="curves", repair="least_squares", search_samples=samples)
        prune(tiny_model("llama"), config, calibration=batches)
    assert torch.equal(fitted[0], ids[4:])
    assert torch.equal(fitted[1], ids)


def test_search_judges_plans_as_repair_will_leave_them():
    """With repair the search ends at a plan whose repaired model is nearer than that of the plan found without."""
    model = tiny_model("llama")
    structure = infer_structure(model)
    batches = [{"input_ids": torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(3))}]
    preview = RepairPreview(model, structure, batches, ridge=1e-2)
    dense = model.eval()(**batches[0]).logits.log_softmax(-1)

    def divergence(plan):
        with torch.no_grad(), preview.applied(plan), masked(model, structure, plan):
            return float((dense.exp() * (dense - model(**batches[0]).logits.log_softmax(-1))).sum())

    found = {}
    for repair in ("none", "least_squares"):
        config = MagnitudeConfig(0.4, allocation="search", repair=repair, search_evaluations=60, search_samples=8)
        found[repair] = divergence(prune(model, config, calibration=batches).plan)
    assert found["least_squares"] < found["none"]
