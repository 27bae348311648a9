"""Consumers: the weights that sum over an axis. Where units are masked, watched, scored and repaired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from hf_prune.structure.axes import Member, Structure

ConsumerKind = Literal["linear", "experts", "other"]


@dataclass(frozen=True)
class Consumer:
    """One weight that sums over an axis. Holds no weights and no modules."""

    axis: str
    parameter: str
    dim: int
    """Of the weight, along which it sums."""
    kind: ConsumerKind
    """`linear`: the weight of an `nn.Linear` or `Conv1D` that meets the last dimension of the input, so that a hook
    sees units; `experts`: a weight `[experts, ...]`, used somewhere inside its module; `other`: as a convolution."""

    @property
    def module_path(self) -> str:
        """Of the module that holds the weight."""
        return self.parameter.rpartition(".")[0]

    @property
    def output_dim(self) -> int:
        """Of a linear or expert weight, the dimension that does not sum."""
        return (1 if self.kind == "linear" else 3) - self.dim

    def units(self, structure: Structure) -> Tensor:
        """int64 `[K]`: the unit of each input, -1 where it has none."""
        return lay.unit_ids(structure.layouts[self.parameter][self.dim], self.axis)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight of a linear layer, or of one expert, as `[D, K]`."""
        return weight.T if self.dim == (0 if self.kind == "linear" else 1) else weight

    def matrices(self, weight: Tensor) -> list[Tensor]:
        """A whole weight as `[D, K]`, one per expert; of a linear layer just one."""
        return [self.matrix(one) for one in (weight if self.kind == "experts" else [weight])]

    def bias(self, model: nn.Module) -> Tensor | None:
        """The bias `[D]` of a linear layer; those of experts stay out of account."""
        found = getattr(model.get_submodule(self.module_path), "bias", None)
        return found if isinstance(found, Tensor) and self.kind == "linear" else None


def consumers_of(model: nn.Module, structure: Structure, axis: str) -> list[Consumer]:
    """The weights that sum over an axis, by name; a tied weight under the name that sums."""
    return [
        Consumer(axis, member.parameter, member.dim, _kind(model, member))
        for member in structure.members[axis]
        if member.role == "consumer"
    ]


def only_consumer(model: nn.Module, structure: Structure, axis: str) -> Consumer | None:
    """What consumes an attention or MLP axis; `None` if that is neither just one linear layer nor experts."""
    found = consumers_of(model, structure, axis)
    fits = len(found) == 1 and structure.axes[axis].branch is not None and found[0].kind != "other"
    return found[0] if fits else None


def _kind(model: nn.Module, member: Member) -> ConsumerKind:
    path, _, name = member.parameter.rpartition(".")
    module = model.get_submodule(path)
    if name == "weight" and isinstance(module, (nn.Linear, Conv1D)):
        return "linear" if member.dim == (1 if isinstance(module, nn.Linear) else 0) else "other"
    return "experts" if module.get_parameter(name).dim() == 3 and member.dim > 0 else "other"
