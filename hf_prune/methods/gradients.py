"""Gradients of the next-token loss over calibration samples, handed on one tensor at a time and freed at once.

Nothing here keeps the gradients of a whole model: a parameter's gradient is given to `consume` the moment autograd has
it, and dropped. With several processes (`accelerate launch`) each handles its share of the samples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from hf_prune.errors import ScoreError
from hf_prune.methods.calibration import Batch, checked_ids, evaluating, input_device

Consume = Callable[[str, Tensor], None]

HALF_SCALE = 2.0**16
"""Largest loss scale for float16, in which gradients near 1e-8 would vanish."""


def my_share(batches: Iterable[Batch], per_sample: bool) -> list[Tensor]:
    """`input_ids` `[B, T]` that this process handles, dealt out in turn; one sample each if `per_sample`."""
    found = [checked_ids(batch) for batch in batches]
    if per_sample:
        found = [row[None] for ids in found for row in ids]
    state = PartialState()
    return found[state.process_index :: state.num_processes]


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, where `values` lie; they themselves where there is one process."""
    state = PartialState()
    if state.num_processes == 1:
        return values
    total: Tensor = reduce(values.to(state.device), reduction="sum")
    return total.to(values.device)


def backward(
    model: nn.Module, ids: Tensor, parameters: Mapping[str, nn.Parameter], consume: Consume, scale: float
) -> None:
    """One forward and backward pass; `consume(name, gradient)` gets each gradient as soon as it is ready.

    The loss is the sum over the samples of their mean next-token losses, so that gradients of batches add up.

    Args:
        model: a causal LM, inside `differentiable`.
        ids: `input_ids` `[B, T]`.
        parameters: those whose gradients are wanted.
        consume: called once per parameter that the loss depends on; float32 unless the parameter is bfloat16.
        scale: factor on the loss during the pass, from `loss_scale`; taken out again.

    Raises:
        ScoreError: the loss is not finite.
    """

    def take(name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            consume(name, gradient if scale == 1.0 else gradient.float() / scale)

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(take, name))  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items()
    ]
    try:
        loss = model(input_ids=ids.to(input_device(model)), labels=ids.to(input_device(model)), use_cache=False).loss
        if not bool(loss.isfinite()):
            raise ScoreError(
                f"the calibration loss is {loss.item()}, expected a finite number. "
                "Score in bfloat16 or float32, and check that the dense model works."
            )
        (loss * (len(ids) * scale)).backward()
    finally:
        for handle in handles:
            handle.remove()


def loss_scale(model: nn.Module, ids: Tensor, parameters: Mapping[str, nn.Parameter]) -> float:
    """Factor on the loss with which no gradient overflows or vanishes: 1 unless the model is float16."""
    if not any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return 1.0
    scale = HALF_SCALE
    while parameters and scale > 1.0:
        overflows: list[bool] = []

        def note(name: str, gradient: Tensor, found: list[bool] = overflows) -> None:
            found.append(not bool(gradient.isfinite().all()))

        backward(model, ids[:1], parameters, note, scale)
        if not any(overflows):
            return scale / 8  # a margin for the other samples
        scale /= 4
    return min(scale, HALF_SCALE / 64)


@contextlib.contextmanager
def differentiable(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within, only `parameters` need gradients, and activations do; evaluation mode; afterwards all is as before.

    Gradient checkpointing, if the caller enabled it on the model, stays on although its layers only use it in training
    mode: the flag is set on the layers themselves, not on what they contain (dropout).

    Raises:
        ScoreError: one of `parameters` is offloaded: hooks on it would see nothing.
    """
    offloaded = next((name for name, parameter in parameters.items() if parameter.is_meta), None)
    if offloaded is not None:
        raise ScoreError(
            f"{offloaded} is offloaded, so its gradient cannot be taken; expected it on a device. Use criterion "
            "'fisher', which reads activations only, or a device_map without offloading."
        )
    wanted = {id(parameter) for parameter in parameters.values()}
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    grads = {parameter: parameter.grad for parameter in needed if parameter.grad is not None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.enable_grad())
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                module.training = True
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        stack.callback(embedding.register_forward_hook(_need_gradient).remove)
        try:
            for parameter in needed:
                parameter.requires_grad_(id(parameter) in wanted)
                parameter.grad = None
            yield
        finally:
            for parameter, flag in needed.items():
                parameter.requires_grad_(flag)
                parameter.grad = grads.get(parameter)


def _need_gradient(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_()
