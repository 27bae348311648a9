"""Routers and their experts while a model runs: experts that are never chosen, and what the chosen ones give.

An expert that is masked is one that the router never chooses: its logit is −∞. So the others share what it had, as they
do once it is sliced away.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_prune.errors import StructureError
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hf_prune.structure.axes import Axis, Structure

_PRODUCTS = (F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_CHOICES = (torch.topk, Tensor.topk)


@contextlib.contextmanager
def never_chosen(
    model: nn.Module, structure: Structure, axis: str, mask: Callable[[], Tensor | None]
) -> Iterator[None]:
    """Within, the router of an axis of experts chooses only those that a mask keeps.

    Args:
        model: the dense model.
        structure: its structure.
        axis: of experts.
        mask: asked at each run: `[rows, num_units]`, true (or above 0) for experts that stay; tokens are `rows` equal
            runs. `None` for all. Where none stays, the first one does: a token must be sent somewhere.
    """
    members = structure.members[axis]
    routers = [
        (*_place(model, m.parameter), lay.unit_ids(structure.layouts[m.parameter][m.dim], axis))
        for m in members
        if m.role == "producer" and len(structure.layouts[m.parameter]) == 2
    ]
    paths = [member.parameter.split(".")[:-1] for member in members]
    alike = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    root = model.get_submodule(".".join(parts[0] for parts in alike))
    running: list[contextlib.ExitStack] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(contextlib.ExitStack())
        running[-1].enter_context(_NeverChosen(routers, structure.axes[axis], mask()))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop().close()

    handles = [root.register_forward_pre_hook(enter), root.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module and the name there of a parameter, which is another tensor each time that it is loaded."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


Choice = tuple[Tensor, Tensor, Tensor]
"""What experts are given: hidden states `[T, D]`, and of each token the experts it is sent to and their gates, `[T, k]`
both."""


@contextlib.contextmanager
def watching_choices(
    model: nn.Module,
    structure: Structure,
    axis: str,
    *,
    given: Callable[[nn.Module, Choice], None] | None = None,
    gradient: Callable[[Choice, Tensor], None] | None = None,
) -> Iterator[None]:
    """Within, show which experts an axis's tokens are sent to.

    Args:
        model: the model.
        structure: its structure.
        axis: of experts.
        given: gets the module of the experts and what it is given; `forward` of that module runs them once more.
        gradient: gets what they are given, and the gradient of the gates `[T, k]`.

    Raises:
        StructureError: these experts are not given their tokens' choices.
    """
    stacked = [m.parameter for m in structure.members[axis] if len(structure.layouts[m.parameter]) > 2]
    modules = [model.get_submodule(path) for path in sorted({name.rpartition(".")[0] for name in stacked})]
    found = [module for module in modules if hasattr(module, "has_gate")]  # the mark of transformers' interface
    if len(found) != 1:
        raise StructureError(
            f"{axis}: expected one module of experts that is given hidden states, choices and gates, found "
            f"{len(found)}: their gates cannot be watched. Score these experts by 'magnitude', or by 'llm_pruner' with "
            "another criterion."
        )
    signature = inspect.signature(type(found[0]).forward)
    names = list(signature.parameters)[1:4]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = signature.bind(module, *args, **kwargs)
        hidden, chosen, gates = (bound.arguments[name] for name in names)
        if given is not None:
            given(module, (hidden, chosen, gates))
        if gradient is None or not gates.requires_grad:
            return None
        alias = gates.view_as(gates)
        choice = hidden.detach(), chosen, gates.detach()
        alias.register_hook(lambda found: gradient(choice, found))
        bound.arguments[names[2]] = alias
        return bound.args[1:], bound.kwargs

    handle = found[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _NeverChosen(TorchFunctionMode):
    """Fills the logits of masked experts, and leaves them out where top-k chooses."""

    def __init__(self, routers: list[tuple[nn.Module, str, Tensor]], axis: Axis, mask: Tensor | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._routers = routers
        """Where weights are, and for each the unit of every logit (-1: of none)."""
        self._copies: list[tuple[Tensor, Tensor]] = []
        """Casts and transposes of them."""
        self._units = torch.arange(axis.num_units)
        self._groups = self._units.view(axis.num_blocks, -1).shape
        self._gone = None
        if mask is not None:
            self._gone = mask.cpu() <= 0
            self._gone[self._gone.all(1), 0] = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._gone is None:
            return func(*args, **kwargs)
        if func in _CHOICES and (args[0].shape[-1] == len(self._units) or args[0].shape[1:] == self._groups):
            chosen = func(self._without(args[0], self._units), *args[1:], **kwargs).indices
            return torch.return_types.topk((args[0].gather(-1, chosen), chosen))  # type: ignore[attr-defined]
        result = func(*args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        weights = [*((module._parameters[name], ids) for module, name, ids in self._routers), *self._copies]
        units = next((ids for weight, ids in weights for value in given if value is weight), None)
        if units is None or not isinstance(result, Tensor):
            return result
        if func in _PRODUCTS:
            return self._without(result, units)
        if result.dim() == 2 and result.numel() == given[0].numel():
            self._copies.append((result, units))
        return result

    def _without(self, logits: Tensor, units: Tensor) -> Tensor:
        """Logits of −∞ where the unit of an entry is gone."""
        assert self._gone is not None
        gone = (self._gone[:, units.clamp_min(0)] & (units >= 0)).to(logits.device)
        rows = logits.reshape(len(gone), -1, len(units))
        return rows.masked_fill(gone[:, None], -torch.inf).view(logits.shape)
