"""Estimates of how the expected loss changes with the policy, from sampled masks and their losses.

s are keep-probabilities `[N]`, m masks `[G, K, N]` (G groups of windows, K masks on each), L losses `[G, K]`. Masks are
only ever compared on the same windows, so what is hard or easy text cancels. All estimates are of the gradient by s of
the mean loss, float32 `[N]`, averaged over the groups; `paper` is a direction, not an unbiased estimate.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(
    keep_probs: Tensor, groups: int, num_masks: int, antithetic: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw masks m = [u < s], one uniform u per unit.

    Args:
        keep_probs: s, `[N]`.
        groups: G.
        num_masks: K, even if `antithetic`.
        antithetic: masks 2i and 2i + 1 are a pair drawn with u and 1 − u.
        generator: source of randomness, on the device of `keep_probs`.

    Returns:
        Masks, bool `[G, K, N]`, and the uniforms, `[G, K, N]` (`[G, K / 2, N]` if `antithetic`).
    """
    shape = (groups, num_masks // 2 if antithetic else num_masks, len(keep_probs))
    uniforms = torch.rand(shape, generator=generator, device=keep_probs.device)
    if not antithetic:
        return uniforms < keep_probs, uniforms
    return torch.stack([uniforms < keep_probs, 1 - uniforms < keep_probs], 2).flatten(1, 2), uniforms


def leave_one_out(losses: Tensor, masks: Tensor, keep_probs: Tensor) -> Tensor:
    """REINFORCE with the mean loss of the other masks as baseline (RLOO, Kool et al. 2019): unbiased."""
    advantages = (losses - losses.mean(1, keepdim=True)) / (losses.shape[1] - 1)
    return _weighted(advantages, masks, keep_probs) / (keep_probs * (1 - keep_probs)) / len(losses)


def paper(losses: Tensor, masks: Tensor, keep_probs: Tensor, baseline: Tensor) -> Tensor:
    """The released code's (arXiv 2406.10576): Σ (L − baseline)·(m − s)/√(s(1 − s)) / (K − 1), by √(s(1 − s)).

    Args:
        losses: `[G, K]`.
        masks: `[G, K, N]`.
        keep_probs: `[N]`.
        baseline: moving average of the mean losses of earlier steps, a scalar: mixes what masks and what texts do.

    Returns:
        `[N]`; times √(s(1 − s)), the direction `paper` gives back what the released code steps along.
    """
    advantages = (losses - baseline) / (losses.shape[1] - 1)
    return _weighted(advantages, masks, keep_probs) / (keep_probs * (1 - keep_probs)) / len(losses)


def arm(losses: Tensor, uniforms: Tensor, keep_probs: Tensor) -> Tensor:
    """Augment-REINFORCE-merge (Yin and Zhou, arXiv 1807.11143): (L(u < s) − L(1 − u < s))·(½ − u): unbiased.

    Args:
        losses: `[G, K]`, pairs one after another.
        uniforms: u of each pair, `[G, K / 2, N]`.
        keep_probs: `[N]`.
    """
    by_logit = torch.einsum("gp,gpn->n", _differences(losses), 0.5 - uniforms) / losses[:, ::2].numel()
    return by_logit / (keep_probs * (1 - keep_probs))


def disarm(losses: Tensor, masks: Tensor, keep_probs: Tensor) -> Tensor:
    """DisARM (Dong et al., arXiv 2006.10680): ARM with u integrated out given the pair of masks: unbiased.

    ½·(L(m) − L(m'))·(m − m')·max(s, 1 − s), where the masks of a pair differ.
    """
    difference = masks[:, ::2].to(keep_probs) - masks[:, 1::2].to(keep_probs)
    by_logit = torch.einsum("gp,gpn->n", _differences(losses), difference) / (2 * losses[:, ::2].numel())
    return by_logit * torch.maximum(keep_probs, 1 - keep_probs) / (keep_probs * (1 - keep_probs))


def by_widths(losses: Tensor, widths: Tensor, noise: float) -> Tensor:
    """Simultaneous perturbation (Spall 1992) of the widths: (L₊ − L₋)·(w₊ − w₋) / 4σ².

    Args:
        losses: `[G, K]`, pairs one after another.
        widths: what was evaluated, `[G, K, A]`; pairs lie ±σ around the policy's widths, apart from bounds and budget.
        noise: σ.

    Returns:
        `[A]`: the gradient by the widths, of the loss smoothed over ±σ.
    """
    between = widths[:, ::2] - widths[:, 1::2]
    total = torch.einsum("gp,gpa->a", _differences(losses), between)
    return total / (4 * noise**2 * losses[:, ::2].numel())


def _differences(losses: Tensor) -> Tensor:
    return losses[:, ::2] - losses[:, 1::2]


def _weighted(advantages: Tensor, masks: Tensor, keep_probs: Tensor) -> Tensor:
    """Σ over masks of advantage·(m − s), without a float copy of more than one group of masks."""
    total = -advantages.sum() * keep_probs
    for own, group in zip(advantages, masks, strict=True):
        total = total + own @ group.to(keep_probs)
    return total
