"""A quick look at what repair would make of a plan: the symmetric closed form, on what the dense model's consumers see.

With H = Σ x xᵀ over the dense inputs of a consumer, K the inputs that stay and C those that go, its weight becomes
`W_K + W_C H_CK (H_KK + λ I)⁻¹`. H is summed once; a plan then costs one factorisation per axis that it prunes.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_prune.errors import CalibrationError
from hf_prune.least_squares import factorised
from hf_prune.methods.calibration import checked_ids, evaluating
from hf_prune.methods.obs import Consumer, collect_grams, only_consumer
from hf_prune.methods.streams import Stream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hf_prune.methods.calibration import Batch
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.structure import Structure

_CACHE_BYTES = 1 << 29
"""Repaired weights that are kept, the latest ones: plans of a search share most of their widths."""


class RepairPreview:
    """Repairs the masked dense model for a while, plan after plan.

    Axes without a single linear consumer (experts) are only masked.

    Args:
        model: the dense model; left as it was.
        structure: its structure.
        batches: `input_ids`, int64 `[B, T]`, without padding.
        ridge: λ as a fraction of the mean diagonal of H, 0 or more.

    Raises:
        CalibrationError: no batch, or activations that are not finite.
        StructureError: layers that hand on more than hidden states.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, structure: Structure, batches: Iterable[Batch], ridge: float) -> None:
        ids = [checked_ids(batch) for batch in batches]
        if not ids:
            raise CalibrationError("repair found no calibration batch, expected one or more: give a calibration text.")
        self._ridge = ridge
        self._consumers: dict[str, Consumer] = {}
        self._grams: dict[str, Tensor] = {}
        self._cache: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        with evaluating(model):
            stream = Stream(model, structure.layer_paths)
            stream.start(ids)
            for layer in range(len(structure.layer_paths)):
                axes = [axis for axis in structure.axes.values() if axis.layer == layer and axis.prunable]
                found = {axis.name: place for axis in axes if (place := only_consumer(model, structure, axis))}
                found = {name: consumer for name, consumer in found.items() if not consumer.stacked}
                for name, (statistics,) in collect_grams(stream, layer, found).items():
                    self._consumers[name] = found[name]
                    self._grams[name] = statistics.symmetric_gram(centred=False)

    @contextlib.contextmanager
    def applied(self, plan: PruningPlan) -> Iterator[None]:
        """Within, the consumers of the dense model have the weights that repair would give them under `plan`."""
        originals: dict[nn.Module, Tensor] = {}
        try:
            for name, kept in plan.kept_indices.items():
                if name in self._consumers:
                    module, weight = self._consumers[name].module, self._consumers[name].weight
                    originals[module] = weight.data
                    weight.data = self._repaired(name, kept)
            yield
        finally:
            for module, data in originals.items():
                module.weight.data = data  # type: ignore[union-attr]

    def _repaired(self, name: str, kept: tuple[int, ...]) -> Tensor:
        """The weight of an axis's consumer, zero where units are gone, in its own layout and dtype."""
        key = (name, kept)
        if key not in self._cache:
            consumer = self._consumers[name]
            stored, ids = consumer.weight.data, consumer.units
            weight = consumer.matrices()[0].to(self._grams[name])
            stays = torch.isin(ids, torch.tensor(kept)) | (ids < 0)
            inside, outside = torch.nonzero(stays)[:, 0], torch.nonzero(~stays)[:, 0]
            gram = self._grams[name]
            factor, *_ = factorised(gram[inside][:, inside], self._ridge)
            gain = torch.cholesky_solve(gram[inside][:, outside] @ weight[:, outside].T, factor).T
            result = torch.zeros_like(weight)
            result[:, inside] = weight[:, inside] + gain
            self._cache[key] = (result.T if consumer.dim == 0 else result).to(stored.dtype).contiguous()
            while sum(found.nbytes for found in self._cache.values()) > _CACHE_BYTES and len(self._cache) > 1:
                self._cache.pop(next(iter(self._cache)))
        return self._cache[key]
