"""Choose again which units stay on each axis, its width given: those whose loss can be repaired best.

Backward elimination by the optimal brain surgeon (Hassibi and Stork, 1993; by structures: ZipLM, arXiv 2302.04089).
With H = Σ x xᵀ of the consumer's input in the dense model (centred if the consumer has a bias), removing the entries B
of a unit raises the squared error of the repaired output by tr(W_B (H⁻¹_BB)⁻¹ W_Bᵀ); then W and H⁻¹ are brought up to
date.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.errors import CalibrationError
from hf_prune.methods.calibration import checked_ids, evaluating
from hf_prune.structure import layouts as lay
from hf_prune.surgery.masking import input_dim
from hf_prune.surgery.repair.statistics import Statistics, factorised
from hf_prune.surgery.repair.streams import Stream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hf_prune.methods.calibration import Batch
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.structure import Axis, Structure

ROUNDS = 128
"""Wide axes lose several units at a time, the cheapest ones, so that there are no more rounds than this."""


@torch.no_grad()
def select_repairable(
    model: nn.Module, structure: Structure, plan: PruningPlan, batches: Iterable[Batch], *, ridge: float = 1e-2
) -> PruningPlan:
    """The plan with the same widths that keeps, on each axis, the units that repair can least do without.

    Axes whose only consumer is not one linear layer (experts), the hidden axis and whole layers keep the plan's units.

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
    with evaluating(model):
        stream = Stream(model, structure.layer_paths)
        stream.start(ids)
        for layer in tqdm(range(len(structure.layer_paths)), desc="selection", unit="layer", leave=False):
            axes = [structure.axes[name] for name in kept if structure.axes[name].layer == layer]
            found = {axis.name: place for axis in axes if (place := only_consumer(model, structure, axis)) is not None}
            grams = collect_grams(stream, layer, {name: module for name, (module, _) in found.items()})
            for name, (module, ids_of_units) in found.items():
                if name in grams:
                    gram = grams[name].symmetric_gram(centred=module.bias is not None)
                    weight = module.weight if input_dim(module) == 1 else module.weight.T
                    kept[name] = eliminate(gram, weight, ids_of_units, len(kept[name]), ridge)  # type: ignore[arg-type]
    return dataclasses.replace(plan, kept_indices=kept)


def eliminate(gram: Tensor, weight: Tensor, units: Tensor, width: int, ridge: float) -> tuple[int, ...]:
    """Remove units until `width` are left.

    Args:
        gram: H `[K, K]` of the consumer's inputs; centred if it has a bias.
        weight: of the consumer, `[D, K]`.
        units: int64 `[K]`, the unit of each input, or -1 where it has none.
        width: units that stay, 1 or more.
        ridge: added to H, as a fraction of its mean diagonal.

    Returns:
        The units that stay, ascending.
    """
    factor, *_ = factorised(gram, ridge)
    inverse = torch.cholesky_inverse(factor)
    weight = weight.detach().to(inverse, copy=True)
    units = units.to(inverse.device)
    alive = sorted({int(unit) for unit in units if unit >= 0})
    entries = {unit: torch.nonzero(units == unit)[:, 0] for unit in alive}
    at_once = math.ceil((len(alive) - width) / ROUNDS)
    while len(alive) > width:
        costs = _costs(inverse, weight, [entries[unit] for unit in alive])
        cheapest = costs.argsort(stable=True)[: min(at_once, len(alive) - width)].tolist()
        gone = torch.cat([entries[alive[index]] for index in cheapest])
        update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weight -= weight[:, gone] @ update
        inverse -= inverse[:, gone] @ update
        alive = [unit for index, unit in enumerate(alive) if index not in set(cheapest)]
    return tuple(alive)


def _costs(inverse: Tensor, weight: Tensor, entries: list[Tensor]) -> Tensor:
    """What the repaired error grows by without each unit: float64 `[units]`."""
    if all(len(found) == 1 for found in entries):
        places = torch.cat(entries)
        return weight[:, places].square().sum(0) / inverse.diagonal()[places]
    blocks = torch.stack([inverse[found][:, found] for found in entries])
    slices = torch.stack([weight[:, found].T for found in entries])
    costs: Tensor = (slices * torch.linalg.solve(blocks, slices)).sum((1, 2))
    return costs


def only_consumer(model: nn.Module, structure: Structure, axis: Axis) -> tuple[nn.Module, Tensor] | None:
    """The linear layer that consumes an axis, and the unit of each of its inputs; `None` if it is not just one."""
    consumers = [member for member in structure.members[axis.name] if member.role == "consumer"]
    if len(consumers) != 1 or axis.kind not in ("attention", "mlp"):
        return None
    path, _, leaf = consumers[0].parameter.rpartition(".")
    module = model.get_submodule(path)
    layouts = structure.layouts[consumers[0].parameter]
    if leaf != "weight" or len(layouts) != 2 or input_dim(module) != consumers[0].dim:
        return None
    return module, lay.unit_ids(layouts[consumers[0].dim], axis.name)


def collect_grams(stream: Stream, layer: int, consumers: dict[str, nn.Module]) -> dict[str, Statistics]:
    """Sums over the inputs of some consumers, while the hidden states go through their layer."""
    grams: dict[str, Statistics] = {}

    def see(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if name not in grams:
            grams[name] = Statistics(x.shape[-1], 0, x.device)
        grams[name].add(x, x.new_zeros(*x.shape[:-1], 0))

    with contextlib.ExitStack() as stack:
        for name, module in consumers.items():
            stack.callback(module.register_forward_pre_hook(partial(see, name)).remove)
        for batch, hidden in enumerate(stream.hidden):
            stream.hidden[batch] = stream.run(layer, batch, hidden)
    return grams
