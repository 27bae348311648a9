"""Gradients of the next-token loss over calibration samples, handed on one parameter at a time and freed at once.

Nothing here keeps the gradients of a whole model: each parameter's gradient is given to `consume` the moment autograd has
it, and dropped. With several processes (`accelerate launch`) each takes its share of the samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.errors import CalibrationError, ScoreError
from hf_prune.methods.calibration import Batch, _checked, _device, _evaluating

Consume = Callable[[str, Tensor], None]

LARGEST_SCALE = 2.0**16
"""Loss scale in float16, where gradients of about 1e-8 would vanish; halved whenever something overflows."""


def my_share(batches: Iterable[Batch], per_sample: bool) -> list[Tensor]:
    """`input_ids` `[B, T]` of the batches that this process handles; one sample each if `per_sample`.

    Samples are dealt out in turn, so that n processes handle n-fold data in the same time.

    Raises:
        CalibrationError: no batch, or an unusable one.
    """
    found = [_checked(batch) for batch in batches]
    if not found:
        raise CalibrationError("calibration found no batch, expected one or more: give a longer text or more samples.")
    if per_sample:
        found = [row[None] for ids in found for row in ids]
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    return found[rank::world]


def distributed() -> bool:
    """Whether several processes work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduce_sum_(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place; does nothing in a single process."""
    if distributed():
        dist.all_reduce(values)
    return values


def backward_over(
    model: nn.Module, shares: list[Tensor], parameters: Mapping[str, nn.Parameter], consume: Callable[[str, Tensor, Tensor], None]
) -> int:
    """Run forward and backward over each share; `consume(name, weight, gradient)` gets the fp32 gradient of its *summed*
    mean losses (one mean next-token loss per sample), for each of `parameters`, which are the only ones that need one.

    Args:
        model: a causal LM; left as it was, also after an error.
        shares: `input_ids` `[B, T]` per backward pass.
        parameters: those whose gradients are wanted.
        consume: called once per share and parameter; must not keep the tensors.

    Returns:
        Number of samples handled, over all processes.

    Raises:
        ScoreError: the loss is not finite.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_differentiable(model, parameters))
        scale = LARGEST_SCALE if _is_half(model) else 1.0
        pending: dict[str, tuple[Tensor, Tensor]] = {}
        for name, parameter in parameters.items():
            stack.callback(parameter.register_post_accumulate_grad_hook(_taker(name, consume, pending, lambda: scale)).remove)
        for ids in tqdm(shares, desc="gradients", unit="batch", leave=False):
            (sum_of_losses(model, ids) * scale).backward()
    total = torch.tensor(sum(len(ids) for ids in shares))
    return int(reduce_sum_(total))
