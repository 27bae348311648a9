"""Measured curves as scores: what the model loses when one axis alone loses units.

As the replace-one library of Puzzle (arXiv 2411.19146) and the tables of ZipLM (arXiv 2302.04089): each axis is cut to
a few widths while all others stay as they are. The slope of a curve's lower convex hull at a step is what the step is
worth, so that taking the cheapest steps first is the best plan for the sum of the hulls, at every ratio and budget.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_prune.allocation.search import Candidate, Evaluator
from hf_prune.layers.price import LEVELS
from hf_prune.layers.weights import evaluating

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from hf_prune.allocation.ladders import Floats, RemovalOrder
    from hf_prune.allocation.search import Preview
    from hf_prune.config import PruningConfig
    from hf_prune.layers.walk import Batch, LayerProtocol
    from hf_prune.layers.work import WorkDir
    from hf_prune.structure.axes import Structure


@torch.no_grad()
def measured_orders(
    ladders: Sequence[RemovalOrder],
    model: nn.Module,
    structure: Structure,
    config: PruningConfig,
    batches: Iterable[Batch],
    preview: Preview | None = None,
    work: WorkDir | None = None,
    protocol: LayerProtocol | None = None,
) -> list[RemovalOrder]:
    """The same orders with what their steps lose as scores, in nats per token: to be taken by `by_score` with `none`.

    `LEVELS` passes over the first `search_samples` windows for each axis; with `work` no other ratio or budget of the
    same scores takes any. Arguments and errors are those of `search`.
    """
    start = [ladder.num_taken for ladder in ladders]
    levels = [_levels(ladder) for ladder in ladders]
    cut = [(axis, level) for axis, own in enumerate(levels) for level in own]
    plans = [Candidate(list(ladders), start)]
    plans += [Candidate(list(ladders), [*start[:axis], level, *start[axis + 1 :]]) for axis, level in cut]
    losses: list[float] = []
    with evaluating(model), tqdm(total=len(plans), desc="curves", unit="plan", leave=False) as bar:
        evaluator = Evaluator(model, structure, config, batches, preview, work, protocol, boundaries=True)
        for first in range(0, len(plans), LEVELS):
            losses += [one.divergence for one in evaluator.evaluate(plans[first : first + LEVELS])]
            bar.update(len(losses) - bar.n)
    rest = iter(losses[1:])
    found = [
        dataclasses.replace(ladder, scores=_worth(ladder, own, [losses[0], *(next(rest) for _ in own)]))
        for ladder, own in zip(ladders, levels, strict=True)
    ]
    tied = {one.tie: [other.scores for other in found if other.tie == one.tie] for one in found if one.tie}
    return [dataclasses.replace(one, scores=np.mean(tied[one.tie], axis=0)) if one.tie else one for one in found]


def _levels(ladder: RemovalOrder) -> list[int]:
    """Steps after which the axis is measured, those beyond what is gone already."""
    free = len(ladder.step_ends) - ladder.num_taken
    return sorted({ladder.num_taken + math.ceil(free * part / LEVELS) for part in range(1, LEVELS + 1) if free})


def _worth(ladder: RemovalOrder, levels: Sequence[int], losses: Sequence[float]) -> Floats:
    """Slope of the lower convex hull at each step, times its units; between the middles of its pieces linear."""
    ends = np.append(0, ladder.step_ends).astype(float)
    hull: list[tuple[float, float]] = []
    for point in zip(ends[[ladder.num_taken, *levels]], losses, strict=True):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) > _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    if len(hull) < 2:
        return ladder.scores
    pieces = list(itertools.pairwise(hull))
    middles = [(left + right) / 2 for (left, _), (right, _) in pieces]
    slopes = [max(0.0, _slope(*piece)) for piece in pieces]
    worth: Floats = np.interp((ends[:-1] + ends[1:]) / 2, middles, slopes) * np.diff(ends)
    return worth


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])
