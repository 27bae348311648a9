"""Choose again which units stay on each axis, its width given: those whose loss can be repaired best.

Backward elimination by the optimal brain surgeon, on what the consumers of the dense model get: see `methods.obs`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from hf_prune.errors import CalibrationError
from hf_prune.layers.masking import keep_mask
from hf_prune.layers.processes import of_main_process
from hf_prune.layers.walk import Walk
from hf_prune.layers.weights import eager_experts
from hf_prune.scores.obs import collecting, costs_of
from hf_prune.structure.consumers import only_consumer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from hf_prune.layers.walk import Batch, Found, LayerProtocol, Part
    from hf_prune.layers.work import WorkDir
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure


@torch.no_grad()
def select_repairable(
    model: nn.Module,
    structure: Structure,
    plan: PruningPlan,
    batches: Iterable[Batch],
    *,
    ridge: float = 1e-2,
    work: WorkDir | None = None,
    protocol: LayerProtocol | None = None,
) -> PruningPlan:
    """The plan with the same widths that keeps, on each axis, the units that repair can least do without.

    Axes that neither one linear layer nor experts consume, the hidden axis and whole layers keep the plan's units.

    Args:
        model: the dense model; left as it was.
        structure: its structure.
        plan: gives the widths; which units it keeps plays no part.
        batches: `input_ids`, int64 `[B, T]`, without padding.
        ridge: added to H, as a fraction of its mean diagonal, 0 or more.
        work: keeps what was found, so that an interrupted pass is resumed.
        protocol: how the model runs its layers, if that is known.

    Raises:
        CalibrationError: no batch, one with padding, or activations that are not finite.
        StructureError: layers that hand on more than hidden states.
    """
    plan.check(structure)
    walk = Walk(model, structure.layer_paths, list(batches), work=work, protocol=protocol)
    if not walk.all_ids:
        raise CalibrationError("selection found no calibration batch, expected one or more: give a calibration text.")
    walk.check_layered()
    kept = dict(plan.kept_indices)
    found = [only_consumer(model, structure, name) for name in kept]
    consumers = [consumer for consumer in found if consumer is not None]

    def visit(part: Part) -> Found:
        chosen: Found = {}
        here = [consumer for consumer in consumers if part.holds(consumer.parameter)]
        with collecting(model, structure, here) as grams:
            part.run()
        for consumer in here:
            sums = [one.over_processes() for one in grams.pop(consumer)]
            if any(one.num_tokens for one in sums):
                costs = costs_of(model, structure, consumer, sums, len(kept[consumer.axis]), ridge)
                stay = costs.isinf().cpu().view(structure.axes[consumer.axis].num_blocks, -1)
                if len(stay) == len(sums):  # an expert that saw nothing keeps the plan's units
                    unseen = torch.tensor([not one.num_tokens for one in sums])[:, None]
                    stay = torch.where(unseen, keep_mask(stay.numel(), kept[consumer.axis]).view_as(stay), stay)
                chosen[consumer.axis] = torch.nonzero(stay.flatten())[:, 0]
        return chosen

    with eager_experts(model):
        units = of_main_process(walk.forward(visit, "selection", layered=True))
    kept |= {axis: tuple(own.tolist()) for axis, own in units.items()}
    return dataclasses.replace(plan, kept_indices=kept)
