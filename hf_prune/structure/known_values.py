"""Values of small tensors that follow from no weight: token ids, positions, masks.

A traced forward pass has no values. Some models need a few: they compare lengths, or visit one expert after another.
Where a value depends on weights (which tokens an expert gets) every entry is taken to be true: all paths are seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

_MOST_ENTRIES = 1 << 17


class KnownValues:
    """Runs the operations on tensors of known values for real, beside the trace."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self.values: dict[int, Tensor] = {}

    def get(self, tensor: Tensor) -> Tensor | None:
        """The value of a traced tensor, if known."""
        known = self.values.get(id(tensor))
        return known if known is not None else getattr(tensor, "constant", None)

    def decide(self, name: str, args: tuple[Any, ...]) -> Any:
        """The result of an operation that cannot be traced without values; `None`: trace it."""
        if name == "_local_scalar_dense" and (known := self.get(args[0])) is not None:
            with unset_fake_temporarily():
                return known.item()
        if name == "nonzero" and args[0].numel() <= _MOST_ENTRIES:
            with unset_fake_temporarily():
                known = self.get(args[0])
                places = (torch.ones(args[0].shape) if known is None else known).nonzero()
            result = self.fake.from_tensor(places)
            self.values[id(result)] = places
            return result
        return None

    def follow(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Repeat an operation on values if all its `inputs` have one; forget what it overwrites otherwise."""
        known = all(self.get(tensor) is not None for tensor in inputs)
        random = torch.Tag.nondeterministic_seeded in func.tags
        if known and not random and sum(tensor.numel() for tensor in outputs) <= _MOST_ENTRIES:
            with unset_fake_temporarily():
                real_args, real_kwargs = tree_map_only(Tensor, self.get, (args, kwargs))
                found = [leaf for leaf in tree_leaves(func(*real_args, **real_kwargs)) if isinstance(leaf, Tensor)]
            self.values.update((id(tensor), value) for tensor, value in zip(outputs, found, strict=True))
        elif func._schema.is_mutable and inputs and (overwritten := self.values.get(id(inputs[0]))) is not None:
            place = overwritten.untyped_storage().data_ptr()
            self.values = {k: v for k, v in self.values.items() if v.untyped_storage().data_ptr() != place}
