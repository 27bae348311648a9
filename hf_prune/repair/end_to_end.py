"""One step of all repaired weights at once, towards what the dense model predicts.

Layer by layer, repair keeps the residual stream as it was, whatever of it the predictions depend on. So afterwards one
backward pass takes g, the gradient of KL(dense ‖ pruned) by the output of each linear consumer, and the step is the
ridge regression of g on the consumer's inputs, over the mean square of g: natural gradient with Kronecker factors
(K-FAC, arXiv 1503.05671), of which the one of the outputs is a number. How far to go, held-out text decides.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.layers.losses import divergence, precision
from hf_prune.layers.processes import of_main_process, shard_batches, sum_numbers
from hf_prune.layers.statistics import HELD_OUT, Statistics, solve_, solving
from hf_prune.layers.walk import Outputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from hf_prune.layers.walk import Found, Part, Walk
    from hf_prune.repair.consumers import Branches, Refit

RIDGE = 0.3
"""Of the regression, as a fraction of the mean square of the inputs."""
FIRST_STEP, STEP_GROWTH = 0.01, 3.0
"""Steps that are tried, as fractions of the one that the slope says would leave no divergence: the first, and so many
times the one before, until held-out text no longer gains."""


def step_end_to_end_(dense: Walk, pruned: Walk, branches: Iterable[Branches]) -> tuple[float, float]:
    """Lower the divergence of the pruned model from the dense one by one step of its linear consumers.

    Args:
        dense: with the hidden states after the last layer.
        pruned: of the same batches, two or more; its model is in memory, and changed in place.
        branches: its consumers, of each layer.

    Returns:
        The divergence on held-out text before and after, in nats per token.

    Raises:
        CalibrationError: gradients that are not finite.
    """
    every, known = pruned.ids, dense.hidden
    number = len(pruned.all_ids)
    # one batch of so many tells how far to go, at least the last one: the same ones whatever the processes
    held_out = set(range(HELD_OUT - 1, number, HELD_OUT)) or {number - 1}
    told = [batch in held_out for batch in shard_batches(range(number))]
    teachers = {id(ids): Outputs(dense, ids, hidden, None) for ids, hidden in zip(every, known, strict=True)}
    try:
        pruned.ids, pruned.teachers = [ids for ids, tells in zip(every, told, strict=True) if not tells], teachers
        steps, slope = _steps(pruned, branches)
        pruned.ids = [ids for ids, tells in zip(every, told, strict=True) if tells]
        before = best = _divergence(pruned, teachers)
        size, taken = of_main_process(FIRST_STEP * before / slope if slope else 0.0), 0.0
        while size:
            _take_(steps, size)
            found = _divergence(pruned, teachers)
            if not of_main_process(found < best):
                _take_(steps, taken)
                break
            best, taken, size = found, size, size * STEP_GROWTH
        return before, best
    finally:
        pruned.ids, pruned.teachers = every, {}


def _steps(pruned: Walk, branches: Iterable[Branches]) -> tuple[list[tuple[Refit, Tensor, Tensor]], float]:
    """The weight of each consumer, and what a step of size 1 adds to it: `[D, K]`, float32 at least, on the CPU.

    Also by how much the divergence of a token falls in such a step, were it to go on as it begins.
    """
    refits: dict[int, list[Refit]] = {}
    for found in branches:
        linear = [refit for refit in found.all() if refit.pruned is not None and refit.consumer.kind == "linear"]
        refits[found.pruned_layer] = linear
    steps: list[tuple[Refit, Tensor, Tensor]] = []
    slopes: list[float] = []

    def visit(part: Part) -> Found:
        assert part.layer is not None
        sums = {}
        for refit in refits[part.layer]:
            num_outputs, num_inputs = refit.consumer.matrix(refit.weight).shape
            sums[refit] = Statistics(num_inputs, num_outputs, refit.weight.device)

        @contextlib.contextmanager
        def each(batch: int) -> Iterator[None]:
            # the loss of a walk is a mean over the tokens of a sample, here each token counts alike
            factor = (pruned.ids[batch].shape[1] - 1) / pruned.scale
            with contextlib.ExitStack() as stack:
                for refit, own in sums.items():
                    assert refit.pruned is not None
                    stack.callback(refit.pruned.register_forward_hook(partial(_watch, own, factor)).remove)
                yield

        part.run(each)
        for refit, own in sums.items():
            total, weight = own.over_processes(), refit.consumer.matrix(refit.weight)
            scale = total.squares / max(total.num_tokens, 1) / len(weight)
            if scale:
                with solving(refit.name):
                    found = solve_(total, torch.zeros_like(weight), None, RIDGE)
                wide = precision(weight)
                step = (-found.weight / scale).to("cpu", wide)
                steps.append((refit, weight.detach().to("cpu", wide, copy=True), step))
                slopes.append((found.error_before - found.error_after) / scale)
        return {}

    pruned.backward(visit, "end to end", layered=True)
    return steps, sum(slopes)


def _watch(sums: Statistics, factor: float, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Add inputs and gradients of a consumer, these times `factor`."""
    if output.requires_grad:
        inputs = args[0].detach()
        output.register_hook(lambda g: sums.add(inputs, g.to(precision(g)) * factor))  # type: ignore[no-untyped-call]


@torch.no_grad()
def _take_(steps: Sequence[tuple[Refit, Tensor, Tensor]], size: float) -> None:
    for refit, weight, step in steps:
        refit.write_(weight + size * step)


@torch.no_grad()
def _divergence(pruned: Walk, teachers: Mapping[int, Outputs]) -> float:
    """Mean over the tokens of all processes, in nats."""
    total = tokens = 0.0
    for outputs in pruned.outputs():
        for (*_, ours), (*_, theirs) in zip(outputs.chunks(), teachers[id(outputs.ids)].chunks(), strict=True):
            total += float(divergence(theirs, ours).sum(dtype=torch.float64))
            tokens += len(ours)
    total, tokens = sum_numbers(total, tokens)
    return total / tokens
