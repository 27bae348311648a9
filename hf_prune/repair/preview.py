"""A quick look at what repair would make of a plan: the symmetric closed form, on what the dense model's consumers see.

With H = Σ x xᵀ over the dense inputs of a consumer, K the inputs that stay and C those that go, its weight becomes
`W_K + W_C H_CK (H_KK + λ I)⁻¹`. H is summed once; a plan then costs one factorisation per axis that it prunes.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.errors import CalibrationError
from hf_prune.layers.boundaries import on_disk
from hf_prune.layers.statistics import factorise_, solving
from hf_prune.layers.walk import Walk
from hf_prune.layers.weights import is_on_disk
from hf_prune.scores.obs import collecting
from hf_prune.structure import layouts as lay
from hf_prune.structure.consumers import Consumer, only_consumer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hf_prune.layers.walk import Batch, Found, LayerProtocol, Part
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure

_CACHE_BYTES = 1 << 29
"""Repaired weights that are kept, the latest ones: plans of a search share most of their widths."""


class RepairPreview:
    """Temporarily repairs the masked dense model, plan after plan.

    Axes without a single linear consumer (experts) are only masked. The sums of all layers are held in float64: those
    of a model on disk in temporary files.

    Args:
        model: the dense model; left as it was.
        structure: its structure.
        batches: `input_ids`, int64 `[B, T]`, without padding.
        ridge: λ as a fraction of the mean diagonal of H, 0 or more.
        protocol: how the model runs its layers, if that is known.

    Raises:
        CalibrationError: no batch, or activations that are not finite.
        StructureError: layers that hand on more than hidden states.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        batches: Iterable[Batch],
        ridge: float,
        protocol: LayerProtocol | None = None,
    ) -> None:
        walk = Walk(model, structure.layer_paths, list(batches), protocol=protocol)
        if not walk.all_ids:
            raise CalibrationError("repair found no calibration batch, expected one or more: give a calibration text.")
        walk.check_layered()
        self._model, self._structure, self._ridge = model, structure, ridge
        found = [only_consumer(model, structure, axis.name) for axis in structure.axes.values() if axis.prunable]
        linear = {one.parameter: one for one in found if one is not None and one.kind == "linear"}
        self._cache: dict[tuple[Any, ...], Tensor] = {}

        def visit(part: Part) -> Found:
            here = [consumer for consumer in linear.values() if part.holds(consumer.parameter)]
            with collecting(model, structure, here) as grams:
                part.run()
            sums = {consumer.parameter: own[0].over_processes() for consumer, own in grams.items()}
            found = {name: own.symmetric_gram(centred=False) for name, own in sums.items() if own.num_tokens}
            return {name: on_disk(gram) if is_on_disk(model) else gram for name, gram in found.items()}

        self._grams = walk.forward(visit, "repair preview", layered=True)
        self._consumers: dict[str, Consumer] = {name: linear[name] for name in self._grams}

    @contextlib.contextmanager
    def applied(self, plan: PruningPlan, layer: int | None = None) -> Iterator[None]:
        """Within, the consumers of the dense model (of one layer) have the weights that repair would give them."""
        originals: dict[nn.Parameter, Tensor] = {}
        try:
            for name, consumer in self._consumers.items():
                layout = self._structure.layouts[name][consumer.dim]
                kept = {axis: plan.kept_indices[axis] for axis in lay.axes(layout) if axis in plan.kept_indices}
                if kept and layer in (None, self._structure.owners[name].layer):
                    weight = self._model.get_parameter(name)
                    originals[weight] = weight.data
                    weight.data = self._repaired(name, kept)
            yield
        finally:
            for weight, data in originals.items():
                weight.data = data

    def _repaired(self, name: str, kept: dict[str, tuple[int, ...]]) -> Tensor:
        """The weight of a consumer, zero where units are gone, in its own layout and dtype."""
        key = (name, *kept.items())
        if key not in self._cache:
            consumer = self._consumers[name]
            stored = self._model.get_parameter(consumer.parameter).data
            gram = self._grams[name].to(stored.device)
            weight = consumer.matrix(stored).to(gram)
            inside = lay.indices(self._structure.layouts[name][consumer.dim], kept).to(stored.device)
            outside = torch.ones(len(gram), device=stored.device).index_fill_(0, inside, 0).nonzero()[:, 0]
            factor = gram[inside][:, inside]
            with solving(name):
                factorise_(factor, self._ridge)
            gain = torch.cholesky_solve(gram[inside][:, outside] @ weight[:, outside].T, factor).T
            result = torch.zeros_like(weight)
            result[:, inside] = weight[:, inside] + gain
            self._cache[key] = (result.T if consumer.dim == 0 else result).to(stored.dtype).contiguous()
            while sum(found.nbytes for found in self._cache.values()) > _CACHE_BYTES and len(self._cache) > 1:
                self._cache.pop(next(iter(self._cache)))
        return self._cache[key]
