"""Choose again which units stay on each axis, its width given: those whose loss can be repaired best.

Backward elimination by the optimal brain surgeon, on what the consumers of the dense model get: see `methods.obs`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from hf_prune.errors import CalibrationError
from hf_prune.methods.calibration import checked_ids, eager_experts, evaluating
from hf_prune.methods.obs import collect_grams, costs_of, only_consumer
from hf_prune.methods.streams import Stream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from hf_prune.methods.calibration import Batch
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.structure import Structure


@torch.no_grad()
def select_repairable(
    model: nn.Module, structure: Structure, plan: PruningPlan, batches: Iterable[Batch], *, ridge: float = 1e-2
) -> PruningPlan:
    """The plan with the same widths that keeps, on each axis, the units that repair can least do without.

    Axes that neither one linear layer nor experts consume, the hidden axis and whole layers keep the plan's units.

    Args:
        model: the dense model; left as it was.
        structure: its structure.
        plan: gives the widths; which units it keeps plays no part.
        batches: `input_ids`, int64 `[B, T]`, without padding.
        ridge: added to H, as a fraction of its mean diagonal, 0 or more.

    Raises:
        CalibrationError: no batch, one with padding, or activations that are not finite.
        StructureError: layers that hand on more than hidden states.
    """
    plan.check(structure)
    ids = [checked_ids(batch) for batch in batches]
    if not ids:
        raise CalibrationError("selection found no calibration batch, expected one or more: give a calibration text.")
    kept = dict(plan.kept_indices)
    with evaluating(model), eager_experts(model):
        stream = Stream(model, structure.layer_paths)
        stream.start(ids)
        for layer in tqdm(range(len(structure.layer_paths)), desc="selection", unit="layer", leave=False):
            axes = [structure.axes[name] for name in kept if structure.axes[name].layer == layer]
            found = {axis.name: place for axis in axes if (place := only_consumer(model, structure, axis)) is not None}
            grams = collect_grams(stream, layer, found)
            for name, consumer in found.items():
                if name in grams:
                    costs = costs_of(consumer, grams[name], len(kept[name]), ridge)
                    kept[name] = tuple(torch.nonzero(costs.isinf())[:, 0].tolist())
    return dataclasses.replace(plan, kept_indices=kept)
