"""How a weight that sums over an axis meets its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from hf_prune.structure.structure import Member

ConsumerKind = Literal["linear", "experts"]


def consumer_kind(module: nn.Module, member: Member) -> ConsumerKind | None:
    """What a consumer is.

    Args:
        module: holds the weight.
        member: the weight, as a consumer of an axis.

    Returns:
        "linear": the weight of an `nn.Linear` or `Conv1D` that meets the last dimension of the module's input, so a
        hook sees the units. "experts": a weight `[experts, ...]`, used somewhere inside its module. `None`: something
        else, as a convolution.
    """
    name = member.parameter.rpartition(".")[2]
    if name == "weight" and isinstance(module, (nn.Linear, Conv1D)):
        return "linear" if member.dim == (1 if isinstance(module, nn.Linear) else 0) else None
    return "experts" if module.get_parameter(name).dim() == 3 and member.dim > 0 else None
