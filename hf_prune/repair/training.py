"""Train all weights of one pruned layer towards the dense model's residual stream, for as long as held-out text gains.

Local distillation, as of blocks in Puzzle (arXiv 2411.19146), after the closed form: gradients go through the softmax
and the gate, to the weights before what was pruned. One layer is in memory, in float32, with Adam's two moments.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_prune.layers.price import EPOCHS
from hf_prune.layers.processes import copy_of_main_process_, least_of_processes, sum_numbers, sum_over_processes
from hf_prune.layers.statistics import HELD_OUT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from hf_prune.layers.walk import Walk

LEARNING_RATE = 1e-3
"""Adam's at first, as a fraction of the root mean square of each tensor's values; falls to 0 as a cosine."""
PATIENCE = 2
"""Epochs without a gain, after which training ends; the best weights stay, those before training among them."""


def train_layer_(
    walk: Walk, layer: int, targets: Sequence[Tensor], shared: Collection[str] = ()
) -> tuple[float, float]:
    """Minimise the squared error of the layer's output.

    Batches are gone through in order, one a step; the last ones are held out and decide which epoch's weights stay.

    Args:
        walk: over the pruned model: its hidden states are what the layer is given.
        layer: its number there; its weights are in memory, and are changed in place.
        targets: per batch what it should give, `[B, T, D]`.
        shared: names of its weights that other layers have too: they stay as they are.

    Returns:
        The mean squared error of held-out tokens, summed over channels, before and after.
    """
    module = walk.model.get_submodule(walk.layer_paths[layer])
    number = len(targets)
    first = least_of_processes(number - max(1, number // HELD_OUT))  # as many steps in each
    with _in_float32(module, shared) as parameters:
        rates = [{"params": [p], "lr": LEARNING_RATE * float(p.norm()) / math.sqrt(p.numel())} for p in parameters]
        optimizer = torch.optim.Adam(rates, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * first)
        before = best = _held_out(walk, layer, targets, first)
        kept = [p.detach().clone() for p in parameters]
        failures = 0
        for _ in range(EPOCHS):
            for batch in range(first):
                with torch.enable_grad():
                    _error(walk, layer, batch, targets[batch]).backward()  # type: ignore[no-untyped-call]
                for parameter in parameters:
                    if parameter.grad is not None:
                        parameter.grad = sum_over_processes(parameter.grad)  # Adam does not see the scale
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            error = _held_out(walk, layer, targets, first)
            if error < best:
                best, failures = error, 0
                for own, parameter in zip(kept, parameters, strict=True):
                    own.copy_(parameter)
            elif (failures := failures + 1) == PATIENCE:
                break
        for own, parameter in zip(kept, parameters, strict=True):
            parameter.copy_(own)
            copy_of_main_process_(parameter)
    return before, best


def _error(walk: Walk, layer: int, batch: int, target: Tensor) -> Tensor:
    """Mean over the tokens of a batch."""
    output = walk.output(layer, batch, walk.hidden[batch], torch.float32)
    return torch.nn.functional.mse_loss(output, target.to(output))


def _held_out(walk: Walk, layer: int, targets: Sequence[Tensor], first: int) -> float:
    errors = [float(_error(walk, layer, batch, targets[batch])) for batch in range(first, len(targets))]
    total, number = sum_numbers(math.fsum(errors), len(errors))
    return total / number * targets[0].shape[-1]


@contextlib.contextmanager
def _in_float32(module: nn.Module, shared: Collection[str]) -> Iterator[list[nn.Parameter]]:
    """The parameters to train; within, halves among all are float32, and these need gradients."""
    parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    before = [(p.dtype, p.requires_grad) for p in parameters.values()]
    for name, parameter in parameters.items():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(name not in shared)
    try:
        yield [parameter for name, parameter in parameters.items() if name not in shared]
    finally:
        for parameter, (dtype, wanted) in zip(parameters.values(), before, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(wanted)
