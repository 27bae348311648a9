"""Mask units of a dense model: the same result as slicing, without changing a weight.

A unit is masked where it is consumed: the input of `o_proj` or `down_proj` is multiplied by zero at its entries.
Between producer and consumer an axis passes only element-wise operations and attention, so nothing else sees the
difference.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import PlanError
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.structure import Member, Structure


@contextlib.contextmanager
def masked(model: nn.Module, structure: Structure, plan: PruningPlan) -> Iterator[nn.Module]:
    """In this context the dense `model` computes what the model pruned by `plan` does; afterwards it is as before.

    Raises:
        PlanError: the plan prunes the hidden axis, which cannot be masked exactly (norms see every channel).
    """
    if "hidden" in plan.kept_indices:
        raise PlanError("the hidden axis cannot be masked: norms see every channel. Compare the sliced model instead.")
    keep_masks = {name: keep_mask(structure.axes[name].num_units, kept) for name, kept in plan.kept_indices.items()}
    with contextlib.ExitStack() as stack:
        for name, mask in keep_masks.items():
            if structure.axes[name].kind != "layer":
                stack.enter_context(mask_axis(model, structure, name, mask))
        for layer, branch in plan.removed_branches:
            path = f"{structure.layer_paths[layer]}.{structure.branch_modules[f'layers.{layer}.{branch}'].path}"
            stack.callback(model.get_submodule(path).register_forward_hook(_zero_output, with_kwargs=True).remove)
        for layer in plan.removed_layers:
            module = model.get_submodule(structure.layer_paths[layer])
            stack.callback(module.register_forward_hook(_pass_through, with_kwargs=True).remove)
        yield model


def keep_mask(num_units: int, kept: tuple[int, ...]) -> Tensor:
    """Bool `[num_units]`, true for the units that stay."""
    mask = torch.zeros(num_units, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


@contextlib.contextmanager
def mask_axis(model: nn.Module, structure: Structure, axis: str, mask: Tensor) -> Iterator[None]:
    """Multiply what the consumers of `axis` receive by `mask` (`[num_units]`, bool or float)."""
    with contextlib.ExitStack() as stack:
        for member in structure.members[axis]:
            if member.role == "consumer":
                layout = structure.layouts[member.parameter][member.dim]
                ids = lay.unit_ids(layout, axis)
                entries = torch.where(ids >= 0, mask[ids.clamp_min(0)].to(torch.float64), 1.0)
                stack.enter_context(_mask_member(model, member, entries))
        yield


def input_dim(module: nn.Module) -> int | None:
    """Which dimension of a module's weight its input's last one meets; `None` where hooks cannot reach the input."""
    if isinstance(module, nn.Linear):
        return 1
    return 0 if isinstance(module, Conv1D) else None


@contextlib.contextmanager
def _mask_member(model: nn.Module, member: Member, entries: Tensor) -> Iterator[None]:
    path, _, name = member.parameter.rpartition(".")
    module = model.get_submodule(path)
    if input_dim(module) == member.dim:
        handle = module.register_forward_pre_hook(lambda _, args: (_scaled(args[0], entries), *args[1:]))
        try:
            yield
        finally:
            handle.remove()
        return
    # Experts and convolutions use their weights inside one forward: zero columns of the weight do the same.
    original = module._parameters[name]
    assert original is not None
    shape = [1] * original.dim()
    shape[member.dim] = -1
    module._parameters[name] = nn.Parameter(_scaled(original.detach(), entries.view(shape)), original.requires_grad)
    try:
        yield
    finally:
        module._parameters[name] = original


def _scaled(values: Tensor, entries: Tensor) -> Tensor:
    return values * entries.to(values)


def _zero_output(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    arguments = {**dict(zip(list(inspect.signature(module.forward).parameters), args, strict=False)), **kwargs}
    residual = arguments.get("residual")  # bloom and mpt add it inside of the branch
    nothing = torch.zeros_like(first) if residual is None else residual
    return (nothing, *output[1:]) if isinstance(output, tuple) else nothing


def _pass_through(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    hidden_states = args[0] if args else kwargs["hidden_states"]
    return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states
