"""Prune a model object in place: optimizers, trainers and wrappers that hold it, or its parameters, go on with it."""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_prune.errors import PlanError
from hf_prune.format.building import build_empty, fresh_config
from hf_prune.format.per_layer import SliceArgument
from hf_prune.surgery.pruning import apply_plan
from hf_prune.surgery.slicing import pruned_name, slice_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure

_PLAIN = (bool, int, float, str, tuple, list, dict, set, NoneType)
_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has: its parameters, children, hooks and mode."""


def apply_plan_(
    model: PreTrainedModel, structure: Structure, plan: PruningPlan, *, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Give `model` the units that `plan` keeps. Modifies `model` and `optimizer` in place.

    The model becomes what `apply_plan` returns, bit for bit, but every module and every `nn.Parameter` that stays is
    the same object; gradients are sliced too. While this runs, the pruned weights are in memory twice.

    Args:
        model: the dense model, all weights in memory; not wrapped (DDP, FSDP) and without adapters.
        structure: its structure.
        plan: kept units.
        optimizer: optimizer of the model's parameters: its moments are sliced, parameters that go are taken out.

    Raises:
        PlanError: the plan or the structure is not for this model, or the optimizer keeps a state that is not shaped
            as its parameter; nothing is changed then.
        StructureError: no config can describe the pruned model.
    """
    replace_contents_(model, apply_plan(model, structure, plan), structure, plan, optimizer=optimizer)


def replace_contents_(
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    structure: Structure,
    plan: PruningPlan,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Move the contents of `pruned`, which `plan` made of `model`, into `model`. See `apply_plan_`.

    `pruned` must not be used afterwards: it shares its tensors with `model`.
    """
    dense = dict(model.state_dict(keep_vars=True))
    moments = _sliced_moments(dense, structure, plan, optimizer) if optimizer is not None else {}
    gone = [tensor for name, tensor in dense.items() if pruned_name(name, structure, plan) is None]
    gradients = {
        id(tensor): slice_tensor(name, tensor.grad, structure, plan)
        for name, tensor in dense.items()
        if tensor.grad is not None and pruned_name(name, structure, plan) is not None
    }
    twin = build_empty(fresh_config(model.config), type(model))
    _graft(model, twin, pruned, "", structure, plan)
    model._pruning_plan = plan  # type: ignore[assignment]
    for tensor in dense.values():
        if id(tensor) in gradients:
            tensor.grad = gradients[id(tensor)]
    if optimizer is not None:
        _adopt(optimizer, moments, {id(tensor) for tensor in gone} - {id(p) for p in model.parameters()})


def _graft(
    live: nn.Module, dense: nn.Module, pruned: nn.Module, path: str, structure: Structure, plan: PruningPlan
) -> None:
    """Give one module, and those inside, the tensors and sizes of `pruned`.

    `dense` is what the constructor made of the dense config: attributes that differ from it in `live` were set at run
    time (checkpointing, modes) and stay.
    """
    for name, value in vars(pruned).items():
        if name not in _OF_TORCH and _is_of_pruning(value, vars(dense).get(name, value)):
            setattr(live, name, value)
    for name, parameter in pruned._parameters.items():
        current = live._parameters[name]
        if parameter is not None and current is not None:
            current.data, current.grad = parameter.data, None
    for name, buffer in pruned._buffers.items():
        before = live._buffers[name]
        if buffer is not None and (before is None or before.shape != buffer.shape):
            live._buffers[name] = buffer
    _select_inputs(live, pruned)
    container, _, _ = structure.layer_paths[0].rpartition(".")
    stay = [layer for layer in range(len(structure.layer_paths)) if layer not in plan.removed_layers]
    children: dict[str, nn.Module | None] = {}
    for name, child in pruned._modules.items():
        old = str(stay[int(name)]) if path == container else name
        own, twin = live._modules.get(old), dense._modules.get(old)
        if child is None or own is None or twin is None or type(twin) is not type(child):
            children[name] = child  # what stands in for a removed branch
        else:
            _graft(own, twin, child, f"{path}.{name}" if path else name, structure, plan)
            children[name] = own
    live._modules.clear()
    live._modules.update(children)


def _is_of_pruning(value: Any, dense: Any) -> bool:
    """Whether an attribute that the constructor set to `dense` became `value` by pruning."""
    if isinstance(value, PreTrainedConfig):
        return True
    return isinstance(value, _PLAIN) and isinstance(dense, _PLAIN) and value != dense


def _select_inputs(live: nn.Module, pruned: nn.Module) -> None:
    """Take over the hooks that choose among inputs (ALiBi slopes of the heads that stay)."""
    for key, hook in list(live._forward_pre_hooks.items()):
        if isinstance(hook, SliceArgument):
            del live._forward_pre_hooks[key]
            live._forward_pre_hooks_with_kwargs.pop(key, None)
    for hook in pruned._forward_pre_hooks.values():
        if isinstance(hook, SliceArgument):
            live.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[arg-type]


def _sliced_moments(
    dense: dict[str, Tensor], structure: Structure, plan: PruningPlan, optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """Per parameter (its id) the states of `optimizer` that are shaped as it, with only the kept units."""
    moments: dict[int, dict[str, Tensor]] = {}
    for name, parameter in dense.items():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        if not state or pruned_name(name, structure, plan) is None:
            continue
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1 != parameter.numel():
                continue
            if value.shape != parameter.shape:
                raise PlanError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {tuple(value.shape)} for {name} of shape "
                    f"{tuple(parameter.shape)}; only states shaped as their parameter can be sliced. Prune before "
                    "training, at its end, or train with AdamW or SGD."
                )
            moments.setdefault(id(parameter), {})[key] = slice_tensor(name, value, structure, plan)
    return moments


def _adopt(optimizer: torch.optim.Optimizer, moments: dict[int, dict[str, Tensor]], gone: set[int]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in gone:
                optimizer.state.pop(parameter, None)
            elif id(parameter) in moments:
                optimizer.state[parameter].update(moments[id(parameter)])
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
