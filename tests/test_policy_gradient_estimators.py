"""Estimators of policy-gradient masks against exact expectations, and the projection against scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from hf_prune.scores.policy_gradient import estimators
from hf_prune.scores.policy_gradient.projection import project

PROBS = torch.tensor([0.15, 0.5, 0.8, 0.35], dtype=torch.float64)
MASKS = torch.tensor(list(itertools.product((0, 1), repeat=4)), dtype=torch.float64)


def loss_of(masks):
    """A loss with interactions of all orders: what each of the 16 masks costs."""
    code = (masks.double() * torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)).sum(-1)
    return 3 + torch.sin(1.7 * code) + 0.2 * code


def probability(masks, probs=PROBS):
    return torch.where(masks > 0, probs, 1 - probs).prod(-1)


def exact_gradient(probs=PROBS):
    probs = probs.clone().requires_grad_()
    (probability(MASKS, probs) * loss_of(MASKS)).sum().backward()
    return probs.grad


@pytest.mark.parametrize("num_masks", [2, 3])
def test_leave_one_out_is_unbiased(num_masks):
    """The expectation over all 16 ** K samples is the gradient."""
    total = torch.zeros(4, dtype=torch.float64)
    for chosen in itertools.product(range(16), repeat=num_masks):
        masks = MASKS[list(chosen)][None]
        estimate = estimators.leave_one_out(loss_of(masks), masks, PROBS)
        total += probability(masks[0]).prod() * estimate
    torch.testing.assert_close(total, exact_gradient(), rtol=1e-10, atol=1e-10)


def pairs():
    """All antithetic pairs [u < s], [1 - u < s] of the four units, with probability and mean of u given the pair."""
    per_unit = []
    for s in PROBS.tolist():
        cells = []
        ends = sorted({0.0, min(s, 1 - s), max(s, 1 - s), 1.0})
        for low, high in itertools.pairwise(ends):
            u = (low + high) / 2
            cells.append((float(u < s), float(1 - u < s), high - low, u))
        per_unit.append(cells)
    for cells in itertools.product(*per_unit):
        first, second, chance, mean = (torch.tensor(values, dtype=torch.float64) for values in zip(*cells, strict=True))
        yield torch.stack([first, second])[None], chance.prod(), mean[None, None]


def test_antithetic_pairs_have_the_marginals_of_the_policy():
    total = sum(chance * masks[0] for masks, chance, _ in pairs())
    torch.testing.assert_close(total, PROBS.expand(2, 4), rtol=1e-12, atol=0)


def test_arm_and_disarm_are_unbiased():
    by_arm, by_disarm = torch.zeros(2, 4, dtype=torch.float64)
    for masks, chance, mean in pairs():  # arm is linear in u, so its mean over a cell is its value at the mean
        by_arm += chance * estimators.arm(loss_of(masks), mean, PROBS)
        by_disarm += chance * estimators.disarm(loss_of(masks), masks, PROBS)
    torch.testing.assert_close(by_arm, exact_gradient(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(by_disarm, exact_gradient(), rtol=1e-10, atol=1e-10)


def test_the_papers_direction_is_the_released_formula():
    masks, baseline = MASKS[[3, 12, 5]][None], torch.tensor(2.5, dtype=torch.float64)
    losses = loss_of(masks)
    found = estimators.paper(losses, masks, PROBS, baseline) * (PROBS * (1 - PROBS)).sqrt()
    expected = sum(
        (loss - baseline) * (mask - PROBS) / (PROBS * (1 - PROBS)).sqrt()
        for loss, mask in zip(losses[0], masks[0], strict=True)
    )
    torch.testing.assert_close(found, expected / 2)


def test_groups_of_windows_are_averaged():
    masks = MASKS[torch.tensor([[1, 6], [9, 14], [0, 15]])]
    losses = loss_of(masks) + torch.tensor([[0.0], [50.0], [-7.0]])  # hard and easy text
    own = [
        estimators.leave_one_out(loss[None] + 3, mask[None], PROBS) for loss, mask in zip(losses, masks, strict=True)
    ]
    torch.testing.assert_close(estimators.leave_one_out(losses, masks, PROBS), torch.stack(own).mean(0))
    own = [estimators.disarm(loss[None] + 3, mask[None], PROBS) for loss, mask in zip(losses, masks, strict=True)]
    torch.testing.assert_close(estimators.disarm(losses, masks, PROBS), torch.stack(own).mean(0))


def test_widths_of_a_quadratic():
    """The expectation over all signs is the gradient: third derivatives are zero."""
    curvature = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, -0.3], [0.1, -0.3, 3.0]], dtype=torch.float64)
    widths, noise = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64), 0.1

    def loss(w):
        return 0.5 * torch.einsum("...a,ab,...b->...", w, curvature, w) + w.sum(-1)

    estimates = []
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        move = noise * torch.tensor(signs, dtype=torch.float64)
        both = torch.stack([widths + move, widths - move])[None]
        estimates.append(estimators.by_widths(loss(both), both, noise))
    torch.testing.assert_close(torch.stack(estimates).mean(0), curvature @ widths + 1)


def test_sampled_masks():
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.02, 0.3, 0.98, 1.0])
    masks, uniforms = estimators.sample(probs, 400, 6, True, generator)
    assert masks.shape == (400, 6, 4)
    assert uniforms.shape == (400, 3, 4)
    assert torch.equal(masks[:, ::2], uniforms < probs)
    assert torch.equal(masks[:, 1::2], 1 - uniforms < probs)
    assert torch.allclose(masks.float().mean((0, 1)), probs, atol=0.03)
    again, _ = estimators.sample(probs, 400, 6, True, torch.Generator().manual_seed(0))
    assert torch.equal(masks, again)
    free, _ = estimators.sample(probs, 400, 6, False, generator)
    correlation = torch.corrcoef(torch.stack([free[:, 0, 1], free[:, 1, 1]]).float())[0, 1]
    assert abs(correlation) < 0.15
    correlation = torch.corrcoef(torch.stack([masks[:, 0, 1], masks[:, 1, 1]]).float())[0, 1]
    assert correlation == pytest.approx(-0.3 / 0.7, abs=0.1)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 8), weighted=st.booleans())
def test_projection_equals_an_independent_solver(seed, size, weighted):
    draw = np.random.default_rng(seed)
    values, costs = draw.normal(0.5, 0.7, size), draw.uniform(0.2, 5, size)
    shift = draw.uniform(0.2, 3, size) if weighted else np.ones(size)
    low, high = 0.02, 0.98
    target = costs.sum() * draw.uniform(0.1, 0.9)
    found = project(
        torch.tensor(values), lambda s: s @ torch.tensor(costs), target, torch.tensor(shift), low, high
    ).numpy()
    weights = costs / shift
    scale = weights.mean()
    solved = minimize(
        lambda x: (weights * (x - values) ** 2).sum() / scale,
        np.clip(values, low, high),
        jac=lambda x: 2 * weights * (x - values) / scale,
        bounds=[(low, high)] * size,
        constraints={"type": "eq", "fun": lambda x: costs @ x - target, "jac": lambda x: costs},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solved.success
    assert costs @ found == pytest.approx(target, rel=1e-9)
    assert np.abs(found - solved.x).max() < 1e-4


def test_projection_moves_up_too_and_leaves_what_may_not_move():
    values = torch.tensor([[0.1, 0.2, 0.3, 1.0], [0.9, 0.9, 0.9, 1.0]])
    shift = torch.tensor([1.0, 1.0, 1.0, 0.0])
    low, high = torch.tensor([0.05, 0.05, 0.05, 1.0]), torch.tensor([0.95, 0.95, 0.95, 1.0])
    found = project(values, lambda s: s.sum(-1), 2.5, shift, low, high)
    assert torch.allclose(found.sum(-1), torch.tensor(2.5))
    assert torch.equal(found[:, 3], torch.ones(2))
    assert bool((found[0, :3] > values[0, :3]).all())
    assert bool((found[1, :3] < values[1, :3]).all())
    assert torch.equal(project(values, lambda s: s.sum(-1), 9.0, shift, low, high)[0], high)  # out of reach: the bound
