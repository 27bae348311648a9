"""Apply a plan to a model in memory: a new, smaller model of the same class."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from hf_prune.errors import PlanError
from hf_prune.structure.building import build_empty, fresh_config
from hf_prune.surgery.configuring import pruned_config
from hf_prune.surgery.slicing import check_tensor, pruned_name, renumber, slice_state_dict

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.structure import Structure


def apply_plan(model: PreTrainedModel, structure: Structure, plan: PruningPlan) -> PreTrainedModel:
    """The model that keeps only the units of `plan`: a new model of the same class; `model` is not changed.

    Args:
        model: the dense model, all weights in memory.
        structure: its structure.
        plan: kept units.

    Returns:
        A model that shares no memory with `model`, on the same devices, in the same dtypes and training mode.

    Raises:
        PlanError: the plan or the structure is not for this model.
        StructureError: no config can describe the pruned model.
    """
    plan.check(structure)
    state = model.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in state.values()):
        raise PlanError("the model has offloaded weights; load it whole (without `device_map` offloading) to prune it.")
    for name, tensor in state.items():
        check_tensor(name, tensor, structure)
    config = pruned_config(model.config, structure, plan, type(model))
    pruned = build_empty(fresh_config(config), type(model))
    sliced = slice_state_dict(state, structure, plan)
    pruned.load_state_dict(sliced, strict=True, assign=True)
    pruned.tie_weights()
    frozen = {pruned_name(name, structure, plan) for name, tensor in state.items() if not tensor.requires_grad}
    for name, tensor in pruned.named_parameters():
        tensor.requires_grad_(name not in frozen)
    _copy_buffers(model, pruned, structure, plan)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    pruned.config._name_or_path = model.config._name_or_path
    pruned.config._attn_implementation = model.config._attn_implementation
    pruned.config._experts_implementation = model.config._experts_implementation
    pruned.config.dtype = model.config.dtype
    pruned._pruning_plan = plan  # type: ignore[assignment]  # `save_pretrained` writes it beside the weights
    return pruned.train(model.training)


def _copy_buffers(model: nn.Module, pruned: nn.Module, structure: Structure, plan: PruningPlan) -> None:
    """Buffers that are not saved (rotary frequencies) are computed by constructors; take the dense model's values."""
    names = dict(model.named_buffers())
    renamed = {_renamed(name, structure, plan): buffer for name, buffer in names.items()}
    for name, buffer in pruned.named_buffers():
        if buffer.is_meta:
            dense: Any = renamed.get(name)
            if dense is not None and dense.shape != buffer.shape and dense.dim() == buffer.dim() and _is_uniform(dense):
                dense = dense.flatten()[:1].expand(buffer.shape)
            if dense is None or dense.shape != buffer.shape:
                raise PlanError(
                    f"buffer {name!r} depends on what is pruned; the model cannot be built from its config."
                )
            path, _, leaf = name.rpartition(".")
            pruned.get_submodule(path).register_buffer(leaf, dense.detach().clone(), persistent=False)


def _is_uniform(values: Tensor) -> bool:
    return values.numel() > 0 and bool((values == values.flatten()[0]).all())


def _renamed(name: str, structure: Structure, plan: PruningPlan) -> str | None:
    for layer, path in enumerate(structure.layer_paths):
        if name.startswith(path + "."):
            if layer in plan.removed_layers:
                return None
            return renumber(name, layer, structure, plan)
    return name
