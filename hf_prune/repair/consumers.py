"""The weights that repair may change: those that sum over a per-layer axis, in the dense and in the pruned model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_prune.layers.processes import copy_of_main_process_
from hf_prune.structure import layouts as lay
from hf_prune.structure.axes import BRANCHES
from hf_prune.structure.consumers import Consumer, consumers_of
from hf_prune.surgery.slicing import pruned_name, renumber

if TYPE_CHECKING:
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Branch, Structure


@dataclass(frozen=True, eq=False)
class Refit:
    """One consumer whose inputs were pruned, or come from a pruned model."""

    consumer: Consumer
    """Of the dense model."""
    kept_inputs: Tensor
    """int64 `[K]`: which of the dense inputs the pruned weight has; `[experts, K]` where each expert has its own."""
    kept_outputs: Tensor
    """int64 `[D]`: which of the dense outputs it has."""
    kept_experts: Tensor
    """int64: which of the dense experts; of a linear layer just one."""
    dense: nn.Module
    """The module that holds the weight in the dense model."""
    pruned: nn.Module | None
    """And in the pruned one: `None` if the whole branch was removed."""

    @property
    def name(self) -> str:
        """Of the weight, in the dense model."""
        return self.consumer.parameter

    @property
    def weight(self) -> Tensor:
        """The pruned weight as it is now."""
        assert self.pruned is not None
        return self.pruned.get_parameter(self.name.rpartition(".")[2])

    @property
    def bias(self) -> Tensor | None:
        """The pruned bias `[D]` as it is now; biases of experts are not repaired."""
        found = getattr(self.pruned, "bias", None) if self.consumer.kind == "linear" else None
        return found if isinstance(found, Tensor) else None

    def write_(self, weight: Tensor, bias: Tensor | None = None, expert: int | None = None) -> None:
        """Put the main process's weight `[D, K]` (and bias `[D]`) into the pruned model, in its dtype and layout."""
        own = self.weight if expert is None else self.weight[expert]
        self.consumer.matrix(own).copy_(weight)
        copy_of_main_process_(own)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)
            copy_of_main_process_(self.bias)


@dataclass(frozen=True)
class Branches:
    """One decoder layer that stays: its consumers, and the modules of its branches where each is one module.

    Branches that were removed have `consumers` and `dense` modules, but no `pruned` ones.
    """

    layer: int
    pruned_layer: int
    """Its number in the pruned model."""
    consumers: dict[Branch, list[Refit]]
    dense: dict[Branch, nn.Module]
    pruned: dict[Branch, nn.Module]

    def all(self) -> list[Refit]:
        """The consumers of both branches."""
        return [consumer for branch in BRANCHES for consumer in self.consumers[branch]]


def find_branches(dense: nn.Module, pruned: nn.Module, structure: Structure, plan: PruningPlan) -> list[Branches]:
    """What there is to repair in each decoder layer that stays.

    Consumers are linear layers and `[experts, ...]` weights; others (convolutions) are left as they are.
    """
    found = []
    for layer in range(len(structure.layer_paths)):
        if layer in plan.removed_layers:
            continue
        before = sum(1 for removed in plan.removed_layers if removed < layer)
        modules: tuple[dict[Branch, nn.Module], dict[Branch, nn.Module]] = ({}, {})
        consumers: dict[Branch, list[Refit]] = {"attention": [], "mlp": []}
        for branch in BRANCHES:
            if (module := structure.branch_modules.get(f"layers.{layer}.{branch}")) is not None:
                path = f"{structure.layer_paths[layer]}.{module.path}"
                modules[0][branch] = dense.get_submodule(path)
                if (layer, branch) not in plan.removed_branches:
                    modules[1][branch] = pruned.get_submodule(renumber(path, layer, structure, plan))
            consumers[branch] = _consumers(dense, pruned, structure, plan, layer, branch)
        found.append(Branches(layer, layer - before, consumers, *modules))
    return found


def _consumers(
    dense: nn.Module, pruned: nn.Module, structure: Structure, plan: PruningPlan, layer: int, branch: Branch
) -> list[Refit]:
    found: dict[str, Refit] = {}
    for axis in structure.axes.values():
        if axis.layer != layer or axis.branch != branch:
            continue
        for consumer in consumers_of(dense, structure, axis.name):
            if consumer.kind == "other" or consumer.parameter in found:
                continue
            layouts = structure.layouts[consumer.parameter]
            new = pruned_name(consumer.parameter, structure, plan)
            found[consumer.parameter] = Refit(
                consumer=consumer,
                kept_inputs=lay.kept_positions(layouts, consumer.dim, plan.kept_indices),
                kept_outputs=lay.indices(layouts[consumer.output_dim], plan.kept_indices),
                kept_experts=lay.indices(layouts[0], plan.kept_indices) if len(layouts) > 2 else torch.zeros(1).long(),
                dense=dense.get_submodule(consumer.module_path),
                pruned=None if new is None else pruned.get_submodule(new.rpartition(".")[0]),
            )
    return list(found.values())
