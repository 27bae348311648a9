"""Apply a plan: a new, smaller model of the same class, in memory or layer by layer on disk."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState, dispatch_model
from torch import Tensor, nn

from hf_prune.atomic import beside, held_by, temporary_directory
from hf_prune.errors import PlanError
from hf_prune.format.building import build_empty, fresh_config
from hf_prune.layers.processes import least_of_processes
from hf_prune.layers.weights import device_map_of, input_device, is_on_disk, resident
from hf_prune.layers.work import read_tensors, write_tensors
from hf_prune.structure import layouts as lay
from hf_prune.surgery.pruned_config import pruned_config
from hf_prune.surgery.slicing import (
    check_tensor,
    on_axis,
    pruned_name,
    renamed,
    renumber,
    slice_state_dict,
    slice_tensor,
)
from hf_prune.surgery.tokens import renumbered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure


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
    if is_on_disk(model):
        raise PlanError(
            "the model is on disk; use `prune`, or PrunedLayers, which writes pruned layers to the disk too."
        )
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        check_tensor(name, tensor, structure)
    pruned = empty_pruned(model, structure, plan)
    sliced = slice_state_dict(state, structure, plan)
    pruned.load_state_dict(sliced, strict=True, assign=True)
    pruned.tie_weights()
    frozen = {pruned_name(name, structure, plan) for name, tensor in state.items() if not tensor.requires_grad}
    for name, tensor in pruned.named_parameters():
        tensor.requires_grad_(name not in frozen)
    _copy_buffers(model, pruned, structure, plan)
    return pruned.train(model.training)


class PrunedLayers:
    """The pruned model while it is made, one decoder layer after the other; tokens of its vocabulary go at the end.

    In memory it is `apply_plan`. Of a model on disk, a layer is loaded, sliced, perhaps changed by the caller, written
    to `folder` and unloaded: the pruned model is on disk as the dense one is. It shares with that what is outside of
    the layers and not pruned.

    Args:
        model: the dense model, in memory or on disk.
        structure: its structure.
        plan: kept units.
        folder: where pruned layers are written; those that are there already are taken from it. `None`: in memory, or
            for a model on disk in a temporary directory that goes with the pruned model.

    Raises:
        PlanError: the plan or the structure is not for this model.
        StructureError: no config can describe the pruned model.
        CheckpointError: the folder cannot be written.
    """

    def __init__(
        self, model: PreTrainedModel, structure: Structure, plan: PruningPlan, folder: Path | None = None
    ) -> None:
        plan.check(structure)
        self._whole_plan = plan
        if "vocab" in plan.kept_indices:  # what is computed on the way reads the dense model's token ids
            kept = {name: units for name, units in plan.kept_indices.items() if name != "vocab"}
            plan = dataclasses.replace(plan, kept_indices=kept)
        self._dense, self._structure, self._plan = model, structure, plan
        self._on_disk, self._opened = is_on_disk(model), False
        if self._on_disk:
            self.model = self._outside()
            self._folder: Path | None = folder or held_by(self.model, temporary_directory())
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._folder, self.model = folder, apply_plan(model, structure, plan)
        self._stay = [layer for layer in range(len(structure.layer_paths)) if layer not in plan.removed_layers]

    @contextlib.contextmanager
    def layer(self, layer: int) -> Iterator[None]:
        """Within, a dense layer and the pruned one (if it stays) are in memory; what is done to the latter counts."""
        dense = self._dense.get_submodule(self._structure.layer_paths[layer])
        if layer in self._plan.removed_layers:
            with resident(dense):
                yield
            return
        module = self.model.get_submodule(self._path(layer))
        with resident(dense):
            if self._on_disk:
                self._load(module, layer)
            yield
        if self._folder is not None:
            self._write(layer, self._folder)
        if self._on_disk:
            for name, parameter in list(module.named_parameters()):
                _assign(module, name, parameter.to("meta"), parameter.requires_grad)

    def known(self, layer: int) -> bool:
        """Whether a layer was written already, so that nothing is left to do for it; in memory it is loaded."""
        if layer in self._plan.removed_layers:
            return True
        if self._folder is None or not self._file(layer).exists():
            return False
        path = self._path(layer)
        module = self.model.get_submodule(path)
        tensors, _ = read_tensors(self._file(layer))
        own = {name.removeprefix(f"{path}."): tensor for name, tensor in tensors.items()}
        buffers = {name for name, _ in module.named_buffers()}
        with torch.no_grad():
            for name, tensor in own.items():
                if name in buffers and self._on_disk:
                    _assign(module, name, tensor, None)
                elif self._on_disk:  # of the dtype that it has in the file
                    _assign(module, name, tensor.to("meta"), module.get_parameter(name).requires_grad)
                else:
                    module.state_dict(keep_vars=True)[name].copy_(tensor)
        return True

    def finish(self) -> PreTrainedModel:
        """The pruned model, once all layers are done."""
        if "vocab" in self._whole_plan.kept_indices:
            self._take_tokens()
            self._opened = False
        self.open()
        return self.model

    def open(self) -> bool:
        """Once all layers are written: let them be loaded again when they run. False where they are in memory."""
        if not self._on_disk or self._opened:
            return self._on_disk
        index: dict[str, dict[str, str]] = {}
        for layer in self._stay:
            path = self._path(layer)
            file = str(self._file(layer).absolute())
            for name, parameter in self.model.get_submodule(path).named_parameters():
                dtype = str(parameter.dtype).removeprefix("torch.")
                index[f"{path}.{name}"] = {"safetensors_file": file, "weight_name": f"{path}.{name}", "dtype": dtype}
        paths = [self._path(layer) for layer in self._stay]
        device_map = device_map_of(self.model, paths, str(input_device(self.model)))
        dispatch_model(self.model, device_map, offload_dir=str(self._folder), offload_index=index)
        self._opened = True
        return True

    def beside(self) -> AbstractContextManager[Path]:
        """A folder beside the layers on disk, for what is needed for a while."""
        assert self._folder is not None
        return beside(self._folder / "steps")

    def rewrite(self, change: Callable[[int], None]) -> None:
        """Write all layers on disk once more, changed: `change` gets the number of each in the pruned model.

        Until the last one is written, the old ones stay.
        """
        assert self._folder is not None
        new = self._folder / "rewritten"
        new.mkdir(exist_ok=True)
        for number, layer in enumerate(self._stay):
            with resident(self.model.get_submodule(self._path(layer))):
                change(number)
                self._write(layer, new)
        (new / "whole").touch()
        PartialState().wait_for_everyone()
        self.rewritten()

    def rewritten(self) -> bool:
        """Whether the layers were rewritten, perhaps by a run that was stopped while it exchanged them."""
        if self._folder is None:
            return False
        if not least_of_processes((self._folder / "rewritten" / "whole").exists()):  # then none has exchanged any
            return False
        for file in (self._folder / "rewritten").glob("*.safetensors"):
            file.replace(self._folder / file.name)
        return True

    def _outside(self) -> PreTrainedModel:
        """The pruned model with all weights but those of its layers."""
        model, structure, plan = self._dense, self._structure, self._plan
        pruned = empty_pruned(model, structure, plan)
        state = {
            name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in structure.owners
        }
        sliced = slice_state_dict(state, structure, plan)
        for name, tensor in sliced.items():
            if tensor.shape == state[name].shape:  # embeddings may be larger than a layer: hold them once
                sliced[name] = state[name].detach()
        pruned.load_state_dict(sliced, strict=False, assign=True)
        pruned.tie_weights()
        for name, parameter in model.named_parameters():
            if (new := pruned_name(name, structure, plan)) is not None:
                pruned.get_parameter(new).requires_grad_(parameter.requires_grad)
        _copy_buffers(model, pruned, structure, plan)
        return pruned.train(model.training)

    def _take_tokens(self) -> None:
        """Take the tokens that go out of the pruned model, which stays the same object: it may hold its files."""
        structure, plan = self._structure, self._whole_plan
        pruned = empty_pruned(self._dense, structure, plan)
        state = {name: x for name, x in self.model.state_dict(keep_vars=True).items() if not x.is_meta}
        rows: dict[int, Tensor] = {}
        for name in (name for name in state if name in structure.layouts and on_axis("vocab", structure, name)):
            dim = next(d for d, layout in enumerate(structure.layouts[name]) if "vocab" in lay.axes(layout))
            if id(state[name]) not in rows:
                kept = torch.tensor(plan.kept_indices["vocab"], device=state[name].device)
                rows[id(state[name])] = state[name].detach().index_select(dim, kept)
        pruned.load_state_dict(
            {name: rows.get(id(x), x.detach()) for name, x in state.items()}, strict=False, assign=True
        )
        pruned.tie_weights()
        for name, parameter in self.model.named_parameters():
            pruned.get_parameter(name).requires_grad_(parameter.requires_grad)
        _copy_buffers(self._dense, pruned, structure, plan)
        vars(self.model).update(vars(pruned.train(self.model.training)))

    def _load(self, module: nn.Module, layer: int) -> None:
        """Slice the dense layer, which is in memory, into the pruned one."""
        path, new = self._structure.layer_paths[layer], self._path(layer)
        for name, tensor in self._dense.get_submodule(path).state_dict(keep_vars=True).items():
            full = f"{path}.{name}"
            if (renamed := pruned_name(full, self._structure, self._plan)) is not None:
                sliced = slice_tensor(full, tensor, self._structure, self._plan)
                wanted = tensor.requires_grad if isinstance(tensor, nn.Parameter) else None
                _assign(module, renamed.removeprefix(f"{new}."), sliced, wanted)

    def _path(self, layer: int) -> str:
        """Of a layer that stays, in the pruned model."""
        return renumber(self._structure.layer_paths[layer], layer, self._structure, self._plan)

    def _write(self, layer: int, folder: Path) -> None:
        path = self._path(layer)
        tensors = self.model.get_submodule(path).state_dict()
        write_tensors(folder / self._file(layer).name, {f"{path}.{name}": tensor for name, tensor in tensors.items()})

    def _file(self, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"layer-{layer:05}.safetensors"


def empty_pruned(model: PreTrainedModel, structure: Structure, plan: PruningPlan) -> PreTrainedModel:
    """The pruned model without weights, with the configs that it will have; `StructureError` if none describe it."""
    config = pruned_config(model.config, structure, plan, type(model))
    pruned = build_empty(fresh_config(config), type(model))
    generation = model.generation_config
    if generation is not None and "vocab" in plan.kept_indices:
        generation = renumbered(generation, plan)
    pruned.generation_config = copy.deepcopy(generation)
    pruned.config._name_or_path = model.config._name_or_path
    pruned.config._attn_implementation = model.config._attn_implementation
    pruned.config._experts_implementation = model.config._experts_implementation
    pruned.config.dtype = model.config.dtype
    pruned._pruning_plan = plan  # type: ignore[assignment]  # `save_pretrained` writes it beside the weights
    return pruned


def _assign(module: nn.Module, name: str, tensor: Tensor, requires_grad: bool | None) -> None:
    """Put a tensor in the place of a parameter (or, without `requires_grad`, of a buffer)."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if requires_grad is None:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)


def _copy_buffers(model: nn.Module, pruned: nn.Module, structure: Structure, plan: PruningPlan) -> None:
    """Buffers that are not saved (rotary frequencies) are computed by constructors; take the dense model's values."""
    dense_buffers = {renamed(name, structure, plan): buffer for name, buffer in model.named_buffers()}
    saved = pruned.state_dict().keys()  # those of layers come with their weights
    for name, buffer in pruned.named_buffers():
        if buffer.is_meta and name not in saved:
            dense: Any = dense_buffers.get(name)
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
