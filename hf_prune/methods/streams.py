"""The decoder layers of a model one at a time: what each is called with, and the hidden states between them.

A model is asked once, with its layers left out, what it calls them with (rotary angles, masks, ALiBi). From then on
each layer is called with that, so the hidden states of a whole calibration set can go through it before the next.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hf_prune.errors import StructureError
from hf_prune.methods.calibration import input_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

PROBE_TOKENS = 8
"""Tokens of the one sample on which the layers are first run as usual."""


class Stop(Exception):  # noqa: N818  # not an error: a forward pass has gone as far as it is needed
    """Ends a forward pass."""


@dataclass
class Call:
    """Arguments of a layer, but for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """Decoder layers of one model, what they are called with for each batch, and the hidden states between them."""

    def __init__(self, model: nn.Module, layer_paths: Sequence[str]) -> None:
        self.model = model
        self.layers = [model.get_submodule(path) for path in layer_paths]
        self.hidden: list[Tensor] = []
        """Per batch the hidden states `[B, T, D]` before the next layer, on the CPU."""
        self.calls: list[list[Call]] = []
        """Per batch one call per layer."""
        self._outputs: list[Any] = []

    def start(self, batches: Sequence[Tensor]) -> None:
        """Find what the layers are called with for each batch of `input_ids`, and the first hidden states.

        Raises:
            StructureError: the layers exchange more than hidden states, so they cannot be run one at a time.
        """
        self._probe(batches[0][:1, :PROBE_TOKENS])
        for ids in batches:
            hidden, calls = self._calls(ids)
            self.hidden.append(hidden.cpu())
            self.calls.append(calls)

    def run(self, layer: int, batch: int, hidden: Tensor) -> Tensor:
        """Output hidden states of one layer, on the CPU."""
        module, call = self.layers[layer], self.calls[batch][layer]
        device = input_device(module)
        args, kwargs = send_to_device((call.args, call.kwargs), device)
        hidden = hidden.to(device, copy=True)  # some layers add to it in place
        return first(module(hidden, *args, **kwargs)).cpu()

    def _probe(self, ids: Tensor) -> None:
        """Run the model as usual on a few tokens: what the layers return, and whether they can be run one by one."""
        inputs: list[Tensor] = []
        arguments: list[Call] = []
        self._outputs = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, call = _split(args, kwargs)
            inputs.append(hidden.cpu())
            arguments.append(call)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._outputs.append(output)

        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after).remove)
            self.model(input_ids=ids.to(input_device(self.model)), use_cache=False)
        ran_in_order = len(inputs) == len(self.layers) and all(
            _equal(first(output), hidden) for output, hidden in zip(self._outputs[:-1], inputs[1:], strict=True)
        )
        if ran_in_order:
            _, calls = self._calls(ids)
            if all(_same(call, found) for call, found in zip(arguments, calls, strict=True)):
                return
        raise StructureError(
            f"the decoder layers of {type(self.model).__name__} hand on more than hidden states, expected only "
            "those; they cannot be run one at a time, and not be repaired. Prune with repair='none'."
        )

    def _calls(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """What the layers are called with, while none of them computes anything."""
        start: list[Tensor] = []
        calls: list[Call] = []

        def leave_out(layer: int, *args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            start[:] = start or [hidden]
            calls.append(call)
            if layer == len(self.layers) - 1:
                raise Stop
            return with_first(self._outputs[layer], hidden)

        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(replaced_forward(layer, _bound(leave_out, index)))
            with contextlib.suppress(Stop):
                self.model(input_ids=ids.to(input_device(self.model)), use_cache=False)
        return start[0], calls


@contextlib.contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` for a while."""
    own = module.__dict__.get("forward")  # accelerate sets one on modules that it moves
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own


def first(output: Any) -> Tensor:
    """The hidden states of what a module returned: itself, or the first of several."""
    result: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return result


def with_first(output: Any, hidden: Tensor) -> Any:
    """`output` with other hidden states."""
    return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden


def _bound(function: Callable[..., Any], index: int) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(index, *args, **kwargs)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states, and the rest: `Stream.run` gives them as the first argument."""
    if args:
        return args[0], Call(args[1:], dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states"), Call((), rest)


def _same(call: Call, other: Call) -> bool:
    """Whether all tensors of two calls are equal."""
    left, right = ([x for x in tree_leaves((c.args, c.kwargs)) if isinstance(x, Tensor)] for c in (call, other))
    return len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _equal(left: Tensor, right: Tensor) -> bool:
    left, right = left.cpu(), right.cpu()
    return left.shape == right.shape and bool(((left == right) | (left != left)).all())  # NaN is reported later
