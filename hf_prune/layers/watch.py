"""Watch what consumers are given and give, and their gradients, while a model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from hf_prune.structure.consumers import Consumer

Given = Callable[["Consumer", int, Tensor], None]
"""Takes a consumer, the number of its first expert, and inputs `[experts, ..., K]`; a linear layer is one expert."""
Gives = Callable[["Consumer", int, int, Tensor], None]
"""Takes a consumer, the number of the first expert, how many, and a tensor of the shape of their outputs."""
InputGradient = Callable[["Consumer", Tensor, Tensor], None]
"""Takes a linear consumer, its input, and the gradient that comes to this input through this consumer alone."""

_LINEAR = (F.linear,)
_MATMUL = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)


@contextlib.contextmanager
def watching(
    model: nn.Module,
    consumers: Iterable[Consumer],
    *,
    given: Given | None = None,
    gives: Gives | None = None,
    gradient: Gives | None = None,
    input_gradient: InputGradient | None = None,
) -> Iterator[None]:
    """Within, show what linear consumers and experts do. Experts are seen by the readable loop (`eager_experts`) only.

    Args:
        model: the model; the weights of experts that are watched are in memory.
        consumers: which; those of kind `other` cannot be watched.
        given: gets what consumers are given.
        gives: gets what they give.
        gradient: gets the gradient of what they give.
        input_gradient: gets what linear consumers are given together with its gradient.
    """

    def output(consumer: Consumer, first: int, used: int, values: Tensor) -> None:
        if gives is not None:
            gives(consumer, first, used, values)
        # not in the first of the two forward passes of gradient checkpointing
        if gradient is not None and values.requires_grad:
            values.register_hook(partial(gradient, consumer, first, used))  # type: ignore[no-untyped-call]

    with contextlib.ExitStack() as stack:
        experts: dict[Consumer, Tensor] = {}
        for consumer in consumers:
            if consumer.kind == "experts":
                experts[consumer] = model.get_parameter(consumer.parameter)
            if consumer.kind != "linear":
                continue
            module = model.get_submodule(consumer.module_path)
            if given is not None or input_gradient is not None:
                hook = partial(_before, consumer, given, input_gradient)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if gives is not None or gradient is not None:
                stack.callback(module.register_forward_hook(partial(_after, consumer, output)).remove)
        if experts:
            stack.enter_context(_ExpertProducts(experts, given, output))
        yield


def _before(
    consumer: Consumer,
    given: Given | None,
    input_gradient: InputGradient | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    if given is not None:
        given(consumer, 0, x.detach()[None])
    if input_gradient is None or not x.requires_grad:
        return None
    alias = x.view_as(x)  # its gradient comes through this consumer alone
    saved = x.detach()
    alias.register_hook(lambda gradient: input_gradient(consumer, saved, gradient))  # type: ignore[no-untyped-call]
    return ((alias, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): alias})


def _after(consumer: Consumer, see: Gives, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    see(consumer, 0, 1, output)


class _ExpertProducts(TorchFunctionMode):
    """Watches matrix products whose weight is a view of a `[experts, ...]` parameter."""

    def __init__(self, watched: Mapping[Consumer, Tensor], see: Given | None, see_output: Gives) -> None:
        super().__init__()
        self._watched = {weight.untyped_storage().data_ptr(): (c, weight) for c, weight in watched.items()}
        self._see, self._see_output = see, see_output

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = None
        if (func in _LINEAR or func in _MATMUL) and len(args) >= 2:
            found = self._find(args[0], args[1])
        if found is not None and self._see is not None:
            consumer, first, used = found
            self._see(consumer, first, args[0].detach().reshape(used, -1, args[0].shape[-1]))
        result = func(*args, **(kwargs or {}))
        if found is not None:
            self._see_output(*found, result)
        return result

    def _find(self, x: Tensor, weight: Tensor) -> tuple[Consumer, int, int] | None:
        """The consumer whose weight `weight` is a view of, its first expert, and how many."""
        if (known := self._watched.get(weight.untyped_storage().data_ptr())) is None:
            return None
        consumer, whole = known
        num_experts, num_channels = whole.shape[0], whole.shape[consumer.dim]
        first, rest = divmod(int(weight.storage_offset() - whole.storage_offset()), whole.stride(0))
        used = weight.numel() // whole[0].numel()
        if rest or used not in (1, num_experts) or x.shape[-1] != num_channels:
            return None
        return consumer, first, used
