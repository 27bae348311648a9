"""Optimal brain surgeon by structures: the scores are what the loss grows by, against a slow reference."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict

import pytest
import torch
from models import shared_model, shared_structure, tiny_model, token_ids

from hf_prune import OBSConfig, prune
from hf_prune.errors import CalibrationError, ConfigError, StructureError
from hf_prune.layers.walk import Walk
from hf_prune.scores import score
from hf_prune.scores.elimination import ROUNDS, invert_, removal_costs
from hf_prune.scores.obs import SquaredGradients
from hf_prune.structure.consumers import only_consumer
from hf_prune.structure.inference import infer_structure

EXACT = {"repair_ridge": 1e-9, "shrinkage": 0.0}


def calibration(num_batches=4, batch=8, length=24):
    return [{"input_ids": token_ids(batch, length, seed=seed)} for seed in range(num_batches)]


def observed(model, module, batches):
    """Inputs `[tokens, K]` of a linear layer, and the gradient `[tokens, D]` of the summed loss by its output."""
    inputs, shifts = [], []

    def hook(module, args, output):
        inputs.append(args[0].detach().flatten(0, -2))
        shifts.append(torch.zeros_like(output, requires_grad=True))
        return output + shifts[-1]

    handle = module.register_forward_hook(hook)
    add_up_gradients(model, batches)
    handle.remove()
    return torch.cat(inputs), torch.cat([shift.grad.flatten(0, -2) for shift in shifts])


def observed_experts(model, experts, batches):
    """The same of each expert of Mixtral, by a loop of our own in place of the model's."""
    inputs, shifts = defaultdict(list), defaultdict(list)

    def forward(hidden, chosen, weights):
        result = torch.zeros_like(hidden)
        for expert in range(experts.num_experts):
            tokens, place = torch.where(chosen == expert)
            gate, up = (hidden[tokens] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            x = experts.act_fn(gate) * up
            y = x @ experts.down_proj[expert].T
            inputs[expert].append(x.detach())
            shifts[expert].append(torch.zeros_like(y, requires_grad=True))
            result = result.index_add(0, tokens, (y + shifts[expert][-1]) * weights[tokens, place, None])
        return result

    experts.forward = forward
    add_up_gradients(model, batches)
    del experts.forward
    return [
        (torch.cat(inputs[expert]), torch.cat([shift.grad for shift in shifts[expert]]))
        for expert in range(experts.num_experts)
    ]


def add_up_gradients(model, batches):
    for batch in batches:
        ids = batch["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    model.zero_grad()


def reference(seen, weights, bias, units, num_tokens):
    """Greedy removal; each time every candidate is measured by least squares on all the tokens, of all experts."""

    def error(kept):
        total = 0.0
        for (x, gradient), weight in zip(seen, weights, strict=True):
            wanted = x @ weight.T
            known = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1) if bias is not None else x
            ids = torch.cat([units, torch.tensor([-1])]) if bias is not None else units
            columns = known[:, torch.isin(ids, torch.tensor([-1, *sorted(kept)]))]
            left = wanted
            if columns.shape[1]:
                left = wanted - columns @ torch.linalg.lstsq(columns, wanted).solution
            total += float(left.square().sum() * gradient.square().mean()) / (2 * num_tokens)
        return total

    alive, before, highest = set(units.tolist()) - {-1}, 0.0, 0.0
    scores = torch.zeros(len(alive), dtype=torch.float64)
    while alive:
        after, gone = min((error(alive - {unit}), unit) for unit in alive)
        highest, before = max(highest, after - before), after
        scores[gone] = highest
        alive.remove(gone)
    return scores


@pytest.mark.parametrize(
    ("family", "axis"),
    [
        *((family, axis) for family in ("llama", "gpt2") for axis in ("layers.1.mlp", "layers.1.attention")),
        ("mixtral", "layers.1.mlp"),
    ],
)
def test_scores_are_those_of_a_slow_reference(family, axis):
    model, structure, batches = tiny_model(family), shared_structure(family), calibration()
    consumer = only_consumer(model, structure, axis)
    module = model.get_submodule(consumer.module_path)
    seen = observed_experts(model, module, batches) if family == "mixtral" else [observed(model, module, batches)]
    num_tokens = sum(batch["input_ids"].numel() for batch in batches)
    weight = model.get_parameter(consumer.parameter).detach()
    weights = {"llama": [weight], "gpt2": [weight.mT], "mixtral": list(weight)}[family]
    wanted = reference(seen, weights, consumer.bias(model), consumer.units(structure), num_tokens)
    found = score(model, structure, OBSConfig(0.5, **EXACT), batches)[axis].double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.max()))


def plain_removal_costs(grams, weights, units, width, ridge, worth):
    """The same rounds, written down straight: all of H⁻¹ and W each time."""
    parts = []
    for gram, weight in zip(grams, weights, strict=True):
        shifted = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        parts.append((torch.linalg.inv(shifted), weight.clone()))
    alive = sorted(set(units.tolist()) - {-1})
    result, highest = torch.full((len(alive),), math.inf, dtype=torch.float64), 0.0
    at_once = math.ceil((len(alive) - width) / ROUNDS)
    while len(alive) > width:
        costs = []
        for unit in alive:
            rows = torch.nonzero(units == unit)[:, 0]
            costs.append(
                sum(
                    factor * float((weight[:, rows] @ inverse[rows[:, None], rows].inverse() * weight[:, rows]).sum())
                    for (inverse, weight), factor in zip(parts, worth, strict=True)
                )
            )
        cheapest = sorted(range(len(alive)), key=costs.__getitem__)[: min(at_once, len(alive) - width)]
        for index in cheapest:
            highest = max(highest, costs[index])
            result[alive[index]] = highest
        gone = torch.cat([torch.nonzero(units == alive[index])[:, 0] for index in cheapest])
        for index, (inverse, weight) in enumerate(parts):
            update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
            parts[index] = inverse - inverse[:, gone] @ update, weight - weight[:, gone] @ update
        alive = [unit for unit in alive if not math.isfinite(result[unit])]
    return result


LAYOUTS = {
    "one input each": lambda: torch.arange(280),
    "one input each, shuffled, some without a unit": lambda: torch.randperm(300).where(torch.arange(300) % 9 != 4, -1),
    "blocks": lambda: torch.arange(20).repeat_interleave(16),
    "interleaved": lambda: torch.arange(20).repeat(16),
    "of several sizes, some without a unit": lambda: torch.cat(
        [
            torch.tensor([-1, -1]),
            torch.arange(150),
            torch.arange(0, 150, 3),
            torch.arange(0, 150, 6),
            torch.tensor([-1]),
        ]
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("num_experts", "kept"), [(1, 0.0), (1, 0.4), (3, 0.3)])
def test_elimination_is_that_of_plain_matrices(layout, num_experts, kept):
    """In more than one block of rows, several units at a time."""
    torch.manual_seed(1)
    units = LAYOUTS[layout]()
    units = torch.unique(units, return_inverse=True)[1] - int(units.min() < 0)  # numbers without gaps
    grams, weights = [], []
    for _ in range(num_experts):
        x = torch.randn(2 * len(units), len(units), dtype=torch.float64) * (0.1 + torch.rand(len(units)))
        grams.append(x.T @ x)
        weights.append(torch.randn(7, len(units), dtype=torch.float64))
    width, worth = int(kept * (int(units.max()) + 1)), [1.0, 0.3, 2.0][:num_experts]
    before = [gram.clone() for gram in grams]
    found = removal_costs(grams, weights, units, width, 1e-2, worth)
    wanted = plain_removal_costs(grams, weights, units, width, 1e-2, worth)
    assert int(found.isinf().sum()) == width
    assert torch.equal(found.argsort(stable=True), wanted.argsort(stable=True))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    assert all(torch.equal(gram, old) for gram, old in zip(grams, before, strict=True))


@pytest.mark.parametrize(("size", "step"), [(1, 128), (128, 128), (200, 128), (300, 256), (700, 256)])
@pytest.mark.parametrize("condition", [1e1, 1e6])
def test_inverse_in_place(size, step, condition):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    matrix = basis * torch.logspace(0, -math.log10(condition), size, dtype=torch.float64) @ basis.T
    table = torch.full((size, size + 5), math.nan, dtype=torch.float64)
    found = table[:, 5:]
    for start in range(0, size, step):
        found[start : start + step, : start + step] = matrix[start : start + step, : start + step]
    assert invert_(found, step)
    product = (found.tril() + found.tril(-1).T) @ matrix
    assert float((product - torch.eye(size, dtype=torch.float64)).abs().max()) < 1e-12 * condition
    for start in range(0, size, step):  # the diagonal blocks are whole
        block = found[start : start + step, start : start + step]
        torch.testing.assert_close(block, block.T, rtol=1e-9, atol=1e-12 * condition)
    assert table[:, :5].isnan().all()


def test_what_is_not_positive_definite_has_no_inverse_and_gets_more_ridge():
    x = torch.randn(100, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x
    assert not invert_(gram - torch.eye(200, dtype=torch.float64), 128)
    costs = removal_costs([gram], [x[:3]], torch.arange(200), 0, ridge=0.0)
    assert costs.isfinite().all()
    assert (costs >= 0).all()


def test_without_trust_in_others_it_is_the_error_of_leaving_the_unit_out():
    model, structure, batches = tiny_model("llama"), shared_structure("llama"), calibration()
    module = model.model.layers[1].mlp.down_proj
    x, gradient = observed(model, module, batches)
    left_out = x.square().mean(0) * module.weight.detach().square().sum(0)
    configs = {shrinkage: OBSConfig(0.5, repair_ridge=1e-9, shrinkage=shrinkage) for shrinkage in (0.0, 0.5, 1.0)}
    scores = {key: score(model, structure, config, batches)["layers.1.mlp"] for key, config in configs.items()}
    torch.testing.assert_close(scores[1.0].double(), left_out * float(gradient.square().mean()) / 2, rtol=1e-4, atol=0)
    assert scores[0.0].min() < scores[0.5].min() < scores[1.0].min()


def test_gradients_are_those_of_a_shift_of_the_output():
    model, structure, batches = tiny_model("llama"), shared_structure("llama"), calibration()
    names = ("layers.0.mlp", "layers.0.attention")
    consumers = [only_consumer(model, structure, name) for name in names]
    walk = Walk(model, structure.layer_paths, batches)
    gradients = SquaredGradients(walk, consumers)

    def visit(part):
        with gradients.watching():
            part.run(gradients.each)
        return {}

    walk.backward(visit, "gradients")
    for consumer in consumers:
        gradient = observed(model, model.get_submodule(consumer.module_path), batches)[1]
        assert gradients.mean(consumer).tolist() == pytest.approx([float(gradient.square().mean())], rel=1e-6)


def test_checkpointing_and_float16_change_nothing_but_rounding():
    batches = calibration()
    wanted = score(shared_model("llama"), shared_structure("llama"), OBSConfig(0.5), batches)
    checkpointed = tiny_model("llama")
    getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)()
    for model, rtol in ((checkpointed, 1e-5), (tiny_model("llama", dtype=torch.float16), 0.1)):
        found = score(model, infer_structure(model), OBSConfig(0.5), batches)
        for name, values in wanted.items():
            assert float((found[name] - values).abs().max()) <= rtol * float(values.max())


def test_a_unit_that_others_can_say_costs_nothing():
    """Twice the same channel: one of the two may go. Other criteria see two that matter."""
    model, structure = tiny_model("llama"), shared_structure("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for producer in (mlp.gate_proj, mlp.up_proj):
            producer.weight[3] = producer.weight[5]
    scores = score(model, structure, OBSConfig(0.5, **EXACT), calibration())["layers.1.mlp"]
    one, two = sorted(scores[[3, 5]].tolist())
    assert one < 1e-3 * float(scores.median())
    assert two > 0.1 * float(scores.median())


def test_prune_repairs_by_default():
    model, batches = shared_model("llama"), calibration()
    result = prune(model, OBSConfig(0.3), calibration=batches)
    plain = prune(model, OBSConfig(0.3, repair="none"), calibration=batches)
    assert result.plan.kept_indices == plain.plan.kept_indices
    changed = {
        name.rpartition(".")[0].rpartition(".")[2]
        for (name, value), other in zip(
            result.model.state_dict().items(), plain.model.state_dict().values(), strict=True
        )
        if not torch.equal(value, other)
    }
    assert changed == {"o_proj", "down_proj"}


def test_later_steps_score_the_repaired_model(monkeypatch):
    from hf_prune import pipeline

    seen = []

    def own(model, structure, config, batches=None, **known):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return score(model, structure, config, batches, **known)

    monkeypatch.setattr(pipeline, "score", own)
    model, batches = shared_model("llama"), calibration()
    two = prune(model, OBSConfig(0.4, num_steps=2), calibration=batches)
    half = prune(model, OBSConfig(0.2), calibration=batches)
    assert all(torch.equal(seen[1][name], value) for name, value in half.model.state_dict().items())
    assert two.plan.achieved["decoder"] == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda: OBSConfig(0.5, axes=("hidden",)), ConfigError, "axes: 'obs' scores"),
        (lambda: OBSConfig(0.5, shrinkage=1.5), ConfigError, "shrinkage"),
        (lambda: OBSConfig(0.5, shrinkage="half"), ConfigError, "shrinkage"),
        (lambda: prune(shared_model("llama"), OBSConfig(0.5)), CalibrationError, "'obs' needs calibration"),
        (lambda: prune(shared_model("llama"), OBSConfig(0.5), calibration=[]), CalibrationError, "needs calibration"),
        (lambda: score_of_something_else(), StructureError, "Protect this axis"),
    ],
)
def test_bad_input(ask, error, words):
    with pytest.raises(error, match=words):
        ask()


def score_of_something_else():
    """An axis with two consumers."""
    model, structure = shared_model("llama"), shared_structure("llama")
    members = dict(structure.members)
    members["layers.0.mlp"] = [*members["layers.0.mlp"], *(m for m in members["layers.0.mlp"] if m.role == "consumer")]
    return score(model, dataclasses.replace(structure, members=members), OBSConfig(0.5), calibration())
