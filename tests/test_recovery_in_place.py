"""Pruning a model object in place equals pruning a copy, and whoever holds the model or its parameters goes on."""

from __future__ import annotations

import random

import pytest
import torch
from models import logits, make_plan, random_kept, tiny_model, token_ids

from hf_prune import apply_plan, apply_plan_, infer_structure
from hf_prune.errors import PlanError
from hf_prune.surgery.slicing import pruned_name, slice_tensor

WIDTHS, HIDDEN = ("attention", "mlp"), ("attention", "mlp", "hidden")
CASES = [
    *[(family, WIDTHS) for family in ("llama_tied", "gpt2", "bloom", "phi3", "gpt_neox", "falcon", "mixtral")],
    ("llama", HIDDEN),
    ("opt", HIDDEN),
    ("gemma3_text", "layers"),
    ("bloom", "layers.attention"),
    ("llama", "layers.mlp"),
]


def plan_for(structure, kinds):
    if isinstance(kinds, tuple):
        return make_plan(structure, random_kept(structure, random.Random(5), kinds))
    return make_plan(structure, {kinds: (0, 2)})


@pytest.mark.parametrize(("family", "kinds"), CASES)
def test_in_place_equals_a_copy(family, kinds):
    model = tiny_model(family)
    structure = infer_structure(model)
    plan = plan_for(structure, kinds)
    copied = apply_plan(model, structure, plan)
    before = {name: (p, m) for m in [model] for name, p in m.named_parameters()}
    modules = set(map(id, model.modules()))
    apply_plan_(model, structure, plan)
    assert str(model) == str(copied)
    assert model.config.to_dict() == copied.config.to_dict()
    assert model._pruning_plan is plan
    found, expected = model.state_dict(), copied.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logits(model), logits(copied))
    assert torch.equal(model.generate(token_ids(), max_new_tokens=4), copied.generate(token_ids(), max_new_tokens=4))
    kept = {id(parameter) for parameter, _ in before.values()}
    assert {id(parameter) for parameter in model.parameters()} <= kept
    new = [module for module in model.modules() if id(module) not in modules]
    assert all(type(module).__name__ == "ZeroBranch" for module in new)


def one_step(model, optimizer):
    optimizer.zero_grad()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kept", [{"layers.1.mlp": (0, 3, 9), "layers.0.attention": (1,)}, {"layers": (0, 2)}])
def test_optimizer_goes_on_with_its_moments(kept):
    model = tiny_model("llama")
    structure = infer_structure(model)
    plan = make_plan(structure, kept)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    one_step(model, optimizer)
    old = {name: (p, {k: v.clone() for k, v in optimizer.state[p].items()}) for name, p in model.named_parameters()}
    apply_plan_(model, structure, plan, optimizer=optimizer)
    new = dict(model.named_parameters())
    for name, (parameter, state) in old.items():
        renamed = pruned_name(name, structure, plan)
        if renamed is None:
            assert parameter not in optimizer.state
            continue
        assert new[renamed] is parameter
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][key], slice_tensor(name, state[key], structure, plan))
        assert optimizer.state[parameter]["step"] == 1
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in new.values()}
    before = {name: p.detach().clone() for name, p in new.items()}
    one_step(model, optimizer)
    assert not any(torch.equal(before[name], p) for name, p in new.items())


def test_gradients_hooks_and_modes_stay():
    model = tiny_model("llama").train()
    structure = infer_structure(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # before 5.22
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    seen = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    plan = make_plan(structure, {"layers.1.mlp": (2, 5), "layers.2.attention": (0, 2)})
    apply_plan_(model, structure, plan)
    assert model.training
    assert model.model.layers[1].gradient_checkpointing
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, slice_tensor(name, gradients[name], structure, plan))
    logits(model)
    assert seen


def test_states_that_cannot_be_sliced_are_refused_and_nothing_changes():
    model = tiny_model("llama")
    structure = infer_structure(model)
    optimizer = torch.optim.Adafactor(model.parameters())
    one_step(model, optimizer)
    before = logits(model)
    with pytest.raises(PlanError, match="AdamW or SGD"):
        apply_plan_(model, structure, make_plan(structure, {"layers.1.mlp": (2, 5)}), optimizer=optimizer)
    assert torch.equal(logits(model), before)
    assert not hasattr(model, "_pruning_plan")
    with pytest.raises(PlanError, match="llama"):
        apply_plan_(model, infer_structure(tiny_model("qwen3")), make_plan(structure, {"layers.1.mlp": (2, 5)}))
    assert torch.equal(logits(model), before)
