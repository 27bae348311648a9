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
from hf_prune.layers.processes import of_main_process, shard_batches
from hf_prune.layers.statistics import Statistics, best_ridge, factorise_, is_held_out, solving
from hf_prune.layers.walk import Walk, checked_ids
from hf_prune.layers.weights import is_on_disk
from hf_prune.scores.obs import collecting, no_sums
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
    of a model on disk in temporary files. As in repair, the ridge of each consumer is chosen by held-out windows: the
    best for a plan that takes every other unit.

    Args:
        model: the dense model; left as it was.
        structure: its structure.
        batches: `input_ids`, int64 `[B, T]`, without padding.
        ridge: λ as a fraction of the mean diagonal of H, 0 or more; at least, where it is chosen.
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
        batches: Iterable[Batch | Tensor],
        ridge: float,
        protocol: LayerProtocol | None = None,
    ) -> None:
        found = [only_consumer(model, structure, axis.name) for axis in structure.axes.values() if axis.prunable]
        linear = {one.parameter: one for one in found if one is not None and one.kind == "linear"}
        self._model, self._structure = model, structure
        self._cache: dict[tuple[Any, ...], Tensor] = {}
        self._ridges: dict[str, float] = {}
        parts = list(_by_use(batches))
        walk = Walk(model, structure.layer_paths, [batch for batch, _ in parts], protocol=protocol)
        if not walk.all_ids:
            raise CalibrationError("repair found no calibration batch, expected one or more: give a calibration text.")
        walk.check_layered()
        held_out = shard_batches([held for _, held in parts])

        def visit(part: Part) -> Found:
            here = [consumer for consumer in linear.values() if part.holds(consumer.parameter)]
            sums = [no_sums(model, structure, here) for _ in range(2)]  # fitted, held out

            @contextlib.contextmanager
            def each(batch: int) -> Iterator[None]:
                with collecting(model, structure, here) as grams:
                    yield
                for consumer, (own,) in grams.items():
                    sums[held_out[batch]][consumer][0].add_sums(own)

            part.run(each)
            found = {}
            for one in here:
                fitted, held = (own[one][0].over_processes() for own in sums)
                if fitted.num_tokens:
                    self._ridges[one.parameter] = self._ridge_of(one, fitted, held, ridge)
                    fitted.add_sums(held)
                    gram = fitted.symmetric_gram(centred=False)
                    found[one.parameter] = on_disk(gram) if is_on_disk(model) else gram
            return found

        self._grams = walk.forward(visit, "repair preview", layered=True)
        self._consumers: dict[str, Consumer] = {name: linear[name] for name in self._grams}

    def _ridge_of(self, consumer: Consumer, fitted: Statistics, held_out: Statistics, ridge: float) -> float:
        """The ridge with which the inputs of every other unit stand best for those of all, in held-out windows."""
        units = self._structure.axes[consumer.axis].num_units
        if not ridge or not held_out.num_tokens or units < 2:
            return ridge
        layout = self._structure.layouts[consumer.parameter][consumer.dim]
        inside = lay.indices(layout, {consumer.axis: tuple(range(0, units, 2))}).to(fitted.gram.device)
        weight = consumer.matrix(self._model.get_parameter(consumer.parameter).detach()).to(fitted.gram)
        with solving(consumer.parameter):
            kept = [_of_inputs(own, weight, inside) for own in (fitted, held_out)]
            return float(of_main_process(best_ridge(kept[0], kept[1], weight[:, inside], None, ridge)))

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
                factorise_(factor, self._ridges[name])
            gain = torch.cholesky_solve(gram[inside][:, outside] @ weight[:, outside].T, factor).T
            result = torch.zeros_like(weight)
            result[:, inside] = weight[:, inside] + gain
            self._cache[key] = (result.T if consumer.dim == 0 else result).to(stored.dtype).contiguous()
            while sum(found.nbytes for found in self._cache.values()) > _CACHE_BYTES and len(self._cache) > 1:
                self._cache.pop(next(iter(self._cache)))
        return self._cache[key]


def _by_use(batches: Iterable[Batch | Tensor]) -> Iterator[tuple[Batch | Tensor, bool]]:
    """Batches, and whether they are held out: as windows are in repair."""
    first = 0
    for batch in batches:
        ids = batch if isinstance(batch, Tensor) else checked_ids(batch)
        held = is_held_out(first, len(ids))
        first += len(ids)
        if bool(held.all()) or not held.any():
            yield batch, bool(held[0])
        else:
            yield ids[~held], False
            yield ids[held], True


def _of_inputs(sums: Statistics, weight: Tensor, inside: Tensor) -> Statistics:
    """Sums over some inputs of a consumer, towards the outputs that all inputs give."""
    gram = sums.symmetric_gram(centred=False)
    found = Statistics(len(inside), len(weight), gram.device)
    found.gram, found.cross = gram[inside][:, inside], gram[inside] @ weight.T
    found.squares, found.num_tokens = float(((weight @ gram) * weight).sum()), sums.num_tokens
    return found
