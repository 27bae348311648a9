"""Projection onto a budget: one Lagrange multiplier, found by bisection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

ITERATIONS = 48
"""Halvings of the bracket: more than float32 can tell apart."""


def project(
    values: Tensor,
    kept: Callable[[Tensor], Tensor],
    target: Tensor | float,
    shift: Tensor,
    low: Tensor | float,
    high: Tensor | float,
) -> Tensor:
    """Move `values` by a multiple of `shift` until what is kept is `target`: clip(values − v·shift, low, high).

    Where `kept` is linear, kept(x) = Σ costs·x, this is the solution of min ½ Σ (x − values)²·costs/shift under
    low ≤ x ≤ high and Σ costs·x = target (the paper's projection, arXiv 2406.10576, has costs = shift = 1 and ≤). v is
    found by bisection with a fixed number of steps, without a look at the values: nothing waits for the device.

    Args:
        values: `[..., n]`; leading dimensions are projected one by one.
        kept: `[..., n]` → `[...]`, not falling in any entry.
        target: what is to be kept, between kept(low) and kept(high); outside of that the nearest bound is returned.
        shift: `[n]` or like `values`, 0 or more; entries with 0 stay.
        low: lower bounds.
        high: upper bounds.

    Returns:
        Like `values`.
    """
    # filled on the device: a copy of a number from the host would wait for the device
    lowest, highest = (x.to(values) if isinstance(x, Tensor) else values.new_full((), x) for x in (low, high))

    def moved(multiplier: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(values - multiplier[..., None] * shift, highest), lowest)

    smallest = torch.where(shift > 0, shift, torch.inf).amin(-1).clamp_max(1e30)
    reach = (values.abs().amax(-1) + 1) * 2 / smallest  # clips every entry that moves, on either side
    below, above = -reach.expand(values.shape[:-1]), reach.expand(values.shape[:-1])
    for _ in range(ITERATIONS):
        middle = (below + above) / 2
        enough = kept(moved(middle)) >= target
        below, above = torch.where(enough, middle, below), torch.where(enough, above, middle)
    return moved(below)
