"""Mask units of a dense model: the same result as slicing, without changing a weight.

A unit is masked where it is consumed: the input of `o_proj` or `down_proj` is multiplied by zero at its entries.
Between producer and consumer an axis passes only element-wise operations and attention, so nothing else sees the
difference. Experts are masked where they are chosen: their logits of the router are −∞ (`layers/routing.py`).

`masked_rows` does the same with another mask for each row of a batch: many sampled masks in one forward pass.
"""

from __future__ import annotations

import contextlib
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.errors import PlanError, StructureError
from hf_prune.layers.routing import never_chosen
from hf_prune.structure.consumers import Consumer, consumers_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure


@contextlib.contextmanager
def masked(model: nn.Module, structure: Structure, plan: PruningPlan, layer: int | None = None) -> Iterator[nn.Module]:
    """In this context the dense `model` computes what the model pruned by `plan` does; afterwards it is as before.

    Args:
        model: the dense model.
        structure: its structure.
        plan: what to mask.
        layer: mask only in this decoder layer, the one that is in memory; `None`: everywhere.

    Raises:
        PlanError: the plan prunes the hidden axis, which cannot be masked exactly (norms see every channel).
    """
    if "hidden" in plan.kept_indices:
        raise PlanError("the hidden axis cannot be masked: norms see every channel. Compare the sliced model instead.")
    with contextlib.ExitStack() as stack:
        for name, kept in plan.kept_indices.items():
            axis = structure.axes[name]
            if axis.kind != "layer" and layer in (None, axis.layer):
                stack.enter_context(mask_axis(model, structure, name, keep_mask(axis.num_units, kept)))
        for number, branch in plan.removed_branches:
            if layer in (None, number):
                module = structure.branch_modules[f"layers.{number}.{branch}"]
                branch_module = model.get_submodule(f"{structure.layer_paths[number]}.{module.path}")
                stack.callback(branch_module.register_forward_hook(_zero_output, with_kwargs=True).remove)
        for number in plan.removed_layers:
            if layer in (None, number):
                whole = model.get_submodule(structure.layer_paths[number])
                stack.callback(whole.register_forward_hook(_pass_through, with_kwargs=True).remove)
        yield model


def keep_mask(num_units: int, kept: tuple[int, ...]) -> Tensor:
    """Bool `[num_units]`, true for the units that stay."""
    mask = torch.zeros(num_units, dtype=torch.bool)
    mask[list(kept)] = True
    return mask


def along_dim(entries: Tensor, num_dims: int, dim: int) -> Tensor:
    """`[size]`, or `[blocks, size]` with the blocks first, in a shape that broadcasts to a tensor."""
    shape = [1] * num_dims
    shape[dim] = entries.shape[-1]
    if entries.dim() == 2:
        shape[0] = len(entries)
    return entries.view(shape)


@contextlib.contextmanager
def mask_axis(model: nn.Module, structure: Structure, axis: str, mask: Tensor) -> Iterator[None]:
    """Multiply what the consumers of `axis` receive by `mask` (`[num_units]`, bool or float; of experts, bool)."""
    with contextlib.ExitStack() as stack:
        if structure.axes[axis].kind == "expert":
            stack.enter_context(never_chosen(model, structure, axis, lambda: mask[None]))
        for consumer in consumers_of(model, structure, axis):
            ids = consumer.units(structure)
            entries = torch.where(ids >= 0, mask[ids.clamp_min(0)].to(torch.float64), 1.0)
            stack.enter_context(_mask_consumer(model, consumer, entries))
        yield


@contextlib.contextmanager
def masked_rows(model: nn.Module, structure: Structure, axes: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Let the rows of a batch carry different masks. Hooks are set once; masks may change between forward passes.

    Units of attention and MLP axes are masked at the input of their consumers, experts at their router, units of layer
    axes by leaving out the output of the layer or branch. Afterwards the model is as before.

    Args:
        model: the dense model, called with whole rows (`input_ids` `[rows · n, T]`, `use_cache=False`).
        structure: its structure.
        axes: names of the axes that will be masked.

    Yields:
        A dictionary, empty at first, that the hooks read: axis → `[rows, num_units]`, bool (or float on attention and
        MLP axes). An axis that is not in it is not masked. Of `rows · n` rows each mask covers n in a row.

    Raises:
        StructureError: units of an axis cannot be masked row by row: experts and convolutions see no rows, norms see
            every hidden channel, or the branch of a layer is not one module.
    """
    masks: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name in axes:
            if structure.axes[name].kind == "layer":
                _hook_layers(stack, model, structure, name, masks)
            elif structure.axes[name].kind == "expert":
                stack.enter_context(never_chosen(model, structure, name, partial(masks.get, name)))
            else:
                _hook_consumers(stack, model, structure, name, masks)
        yield masks


def _hook_consumers(
    stack: contextlib.ExitStack, model: nn.Module, structure: Structure, axis: str, masks: dict[str, Tensor]
) -> None:
    consumers = consumers_of(model, structure, axis)
    if structure.axes[axis].kind == "hidden" or not consumers:
        raise StructureError(f"{axis}: its units cannot be masked row by row; leave this axis out.")
    for consumer in consumers:
        if consumer.kind != "linear":
            raise StructureError(
                f"{axis}: {consumer.parameter} is not a linear layer that sees one row after another, as masking rows "
                "needs; protect this axis or ask for other axes."
            )
        ids = consumer.units(structure)

        def hook(_: nn.Module, args: tuple[Any, ...], ids: Tensor = ids) -> tuple[Any, ...] | None:
            return (_rows_scaled(args[0], masks[axis], ids), *args[1:]) if axis in masks else None

        stack.callback(model.get_submodule(consumer.module_path).register_forward_pre_hook(hook).remove)


def _hook_layers(
    stack: contextlib.ExitStack, model: nn.Module, structure: Structure, axis: str, masks: dict[str, Tensor]
) -> None:
    branch = axis.partition(".")[2]
    for layer, path in enumerate(structure.layer_paths):
        if branch:
            found = structure.branch_modules.get(f"layers.{layer}.{branch}")
            if found is None:
                raise StructureError(f"the {branch} of layer {layer} is not one module, so {axis} cannot be masked.")
            path = f"{path}.{found.path}"
        without = _zero_output if branch else _pass_through

        def hook(
            module: nn.Module, args: Any, kwargs: Any, output: Any, layer: int = layer, without: Any = without
        ) -> Any:
            if axis not in masks:
                return output
            nothing = without(module, args, kwargs, output)
            kept = masks[axis][:, layer]
            if not isinstance(output, tuple):
                return _rows_chosen(kept, output, nothing)
            return (_rows_chosen(kept, output[0], nothing[0]), *output[1:])

        stack.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)


def _rows_scaled(values: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
    """`values` `[rows · n, ..., entries]` times the entries that `mask` `[rows, num_units]` gives each row."""
    mask = mask.to(values, non_blocking=True)
    ids = ids.to(values.device, non_blocking=True)
    # An entry that carries no unit of the axis (-1) reads the column of ones.
    entries = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)[:, ids]
    return (values.reshape(len(mask), -1, values.shape[-1]) * entries[:, None]).view_as(values)


def _rows_chosen(kept: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    kept = kept.to(values.device, torch.bool, non_blocking=True)[:, None]
    chosen = torch.where(kept, values.reshape(len(kept), -1), otherwise.reshape(len(kept), -1))
    return chosen.view_as(values)


@contextlib.contextmanager
def _mask_consumer(model: nn.Module, consumer: Consumer, entries: Tensor) -> Iterator[None]:
    module = model.get_submodule(consumer.module_path)
    if consumer.kind == "linear":
        handle = module.register_forward_pre_hook(lambda _, args: (_scaled(args[0], entries), *args[1:]))
        try:
            yield
        finally:
            handle.remove()
        return
    # Experts and convolutions use their weights inside one forward: zero columns of the weight do the same.
    name = consumer.parameter.rpartition(".")[2]
    original = module._parameters[name]
    assert original is not None
    entries = along_dim(entries, original.dim(), consumer.dim)
    module._parameters[name] = nn.Parameter(_scaled(original.detach(), entries), original.requires_grad)
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
