"""Values of small tensors that do not depend on weights: token ids, positions, masks.

A traced forward pass has no values. Some models need a few: they compare lengths, or visit one expert after another.
Where a value depends on weights (which tokens an expert gets) every entry is taken to be true: all paths are seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

_MOST_ENTRIES = 1 << 17


class ConstantValues:
    """Runs the operations on tensors of known values for real, beside the trace."""

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}
        self.choices: dict[int, int] = {}
        """Of how many entries a tensor of indices chooses."""

    def get(self, tensor: Tensor) -> Tensor | None:
        """The value of a traced tensor, if known."""
        return self.values.get(id(tensor))

    def note(self, value: Tensor) -> Tensor:
        """A traced tensor in place of `value`, which is remembered."""
        traced = value.to("meta")
        self.values[id(traced)] = value
        return traced

    def evaluate(self, name: str, args: tuple[Any, ...]) -> Any:
        """The result of an operation that cannot be traced without values; `None`: trace it."""
        if name == "lift_fresh" and not args[0].is_meta:
            return self.note(args[0].clone())
        if name == "_local_scalar_dense" and (known := self.get(args[0])) is not None:
            return known.item()
        if name == "nonzero" and args[0].numel() <= _MOST_ENTRIES:
            known = self.get(args[0])
            return self.note((torch.ones(args[0].shape) if known is None else known).nonzero())
        return None

    def of_mask(self, mask: Tensor) -> list[Tensor]:
        """The places of the true entries of a mask, a tensor for each of its dimensions; all if it is not known."""
        known = self.get(mask)
        places = (torch.ones(mask.shape) if known is None else known).nonzero()
        return [self.note(column) for column in places.unbind(1)]

    def one_hot(self, indices: Tensor, num_classes: int) -> Tensor | None:
        """`one_hot` with more classes than `indices` choose from: the others are never true. `None`: trace it."""
        chosen = self.choices.get(id(indices), num_classes)
        if chosen >= num_classes:
            return None
        with _disable_current_modes():  # computed, not traced
            value = (torch.arange(num_classes) < chosen).long().expand(*indices.shape, num_classes)
            return self.note(value.clone())

    def propagate(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Repeat an operation on values if all its `inputs` have one; forget what it overwrites otherwise."""
        if func is torch.ops.aten.topk.default:
            self.choices[id(outputs[1])] = inputs[0].shape[args[2] if len(args) > 2 else -1]
        known = all(self.get(tensor) is not None for tensor in inputs)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if known and not random and sum(tensor.numel() for tensor in outputs) <= _MOST_ENTRIES:
            real_args, real_kwargs = tree_map_only(Tensor, self.get, (args, kwargs))
            if real_kwargs.get("device") is not None:
                real_kwargs = {**real_kwargs, "device": "cpu"}
            found = [leaf for leaf in tree_leaves(func(*real_args, **real_kwargs)) if isinstance(leaf, Tensor)]
            self.values.update((id(tensor), value) for tensor, value in zip(outputs, found, strict=True))
        elif func._schema.is_mutable and inputs and (overwritten := self.values.get(id(inputs[0]))) is not None:
            place = overwritten.untyped_storage().data_ptr()
            self.values = {k: v for k, v in self.values.items() if v.untyped_storage().data_ptr() != place}
