"""Optimal brain surgeon by structures: what the loss grows by without a unit, once the others make up for it.

Hassibi and Stork (1993); by structures ZipLM (arXiv 2302.04089), with gradients LLM Surgeon (arXiv 2312.17244). With
H = Σ x xᵀ over the inputs of the consumer of an axis (centred if it has a bias) and its weight W, removing the entries
B of a unit raises the squared error of the repaired output by tr(W_B (H⁻¹_BB)⁻¹ W_Bᵀ). Units go one after the other,
the cheapest first, and W and H⁻¹ are brought up to date each time. A squared error e of the output changes the loss by
½·g²·e to second order, g² the mean square of the loss gradient there: this makes all axes compare. H is shrunk
towards its diagonal: what other units can say on the calibration text they may not be able to say on another.
"""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.config import OBSConfig, PruningConfig, selected_axes
from hf_prune.errors import CalibrationError, StructureError
from hf_prune.least_squares import Statistics, factorised
from hf_prune.methods.calibration import checked_ids, evaluating
from hf_prune.methods.gradients import backward, differentiable, loss_scale, my_share, sum_over_processes
from hf_prune.methods.streams import Stream
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hf_prune.methods.calibration import Batch
    from hf_prune.structure.structure import Axis, Structure

Consumer = tuple[nn.Module, Tensor]
"""The linear layer that consumes an axis, and the unit of each of its inputs."""
ROUNDS = 128
"""Wide axes lose several units at a time, the cheapest ones, so that there are no more rounds than this."""


def obs_scores(
    model: nn.Module,
    structure: Structure,
    config: PruningConfig,
    *,
    batches: Iterable[Batch] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """What the loss grows by as each unit goes, those before it gone and repaired: nats per token, in nested order.

    One backward pass for the gradients at the outputs of the consumers (no weight gradients), then one forward pass,
    layer by layer, for H: memory is that of the consumers of one layer, twice their Gram matrix in float64. With
    several processes the backward pass is shared; H is summed by each.

    Args:
        model: a causal LM; left as it was.
        structure: its structure.
        config: an `OBSConfig`; `repair_ridge` is added to H, as a fraction of its mean diagonal.
        batches: calibration batches, without padding.
        generator: not used: the method is deterministic.

    Returns:
        float32 `[num_units]` per selected axis, on the CPU; higher = keep. Never lower than that of a unit that goes
        before.

    Raises:
        CalibrationError: no batches, or activations that are not finite.
        StructureError: an axis that one linear layer does not consume (experts), or layers that hand on more than
            hidden states.
        ScoreError: a loss is not finite.
    """
    assert isinstance(config, OBSConfig)
    batches = list(batches or ())
    if not batches:
        raise CalibrationError("method 'obs' needs calibration batches and found none: give a calibration text.")
    consumers: dict[str, Consumer] = {}
    for axis in selected_axes(structure, config):
        found = only_consumer(model, structure, axis)
        if found is None:
            raise StructureError(
                f"{axis.name}: 'obs' scores axes that one linear layer consumes, and found something else (experts, "
                "convolutions). Protect this axis, or use method 'llm_pruner'."
            )
        consumers[axis.name] = found
    gradients = squared_gradients(model, consumers, batches)
    scores: dict[str, Tensor] = {}
    with torch.no_grad(), evaluating(model):
        stream = Stream(model, structure.layer_paths)
        stream.start([checked_ids(batch) for batch in batches])
        for layer in tqdm(range(len(structure.layer_paths)), desc="obs importance", unit="layer", leave=False):
            here = {name: place for name, place in consumers.items() if structure.axes[name].layer == layer}
            grams = collect_grams(stream, layer, {name: module for name, (module, _) in here.items()})
            for name, statistics in grams.items():
                costs = costs_of(here[name], statistics, 0, config.repair_ridge, config.shrinkage)
                scores[name] = (gradients[name] / (2 * statistics.num_tokens) * costs).float().cpu()
    return {name: scores[name] for name in consumers}


def squared_gradients(model: nn.Module, consumers: dict[str, Consumer], batches: Sequence[Batch]) -> dict[str, float]:
    """Mean square, over tokens and channels, of the gradient of the summed loss by the output of each consumer."""
    sums = dict.fromkeys(consumers, 0.0)
    counts = dict.fromkeys(consumers, 0)
    factor = [0.0]

    def watch(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:  # not in the first of the two forward passes of gradient checkpointing
            output.register_hook(partial(take, name))  # type: ignore[no-untyped-call]

    def take(name: str, gradient: Tensor) -> None:
        sums[name] += float((gradient.float() * factor[0]).square().sum(dtype=torch.float64)) if factor[0] else 0.0
        counts[name] += gradient.numel() if factor[0] else 0

    with contextlib.ExitStack() as stack:
        stack.enter_context(differentiable(model, {}))
        for name, (module, _) in consumers.items():
            stack.callback(module.register_forward_hook(partial(watch, name)).remove)
        scale = loss_scale(model, checked_ids(batches[0]), {})
        for ids in tqdm(my_share(batches, per_sample=False), desc="gradients", unit="batch", leave=False):
            factor[0] = (ids.shape[1] - 1) / scale  # the loss of `backward` is a mean over tokens
            backward(model, ids, {}, lambda *_: None, scale)
    totals = sum_over_processes(torch.tensor([list(sums.values()), list(map(float, counts.values()))]).double())
    return dict(zip(consumers, (totals[0] / totals[1].clamp_min(1)).tolist(), strict=True))


def costs_of(consumer: Consumer, statistics: Statistics, width: int, ridge: float, shrinkage: float = 0.0) -> Tensor:
    """`removal_costs` of the axis of a consumer, with (1 − shrinkage) H + shrinkage · diag H in place of H."""
    from hf_prune.surgery.masking import input_dim

    module, units = consumer
    stored: Tensor = module.weight  # type: ignore[assignment]
    gram = statistics.symmetric_gram(centred=module.bias is not None)
    gram = torch.lerp(gram, gram.diagonal().diag(), shrinkage)
    return removal_costs(gram, stored if input_dim(module) == 1 else stored.T, units, width, ridge)


def removal_costs(gram: Tensor, weight: Tensor, units: Tensor, width: int, ridge: float) -> Tensor:
    """Remove units until `width` are left.

    Args:
        gram: H `[K, K]` of the consumer's inputs; centred if it has a bias.
        weight: of the consumer, `[D, K]`.
        units: int64 `[K]`, the unit of each input, or -1 where it has none.
        width: units that stay, 0 or more.
        ridge: added to H, as a fraction of its mean diagonal.

    Returns:
        float64 `[units]`: what the squared error of the repaired output grows by as the unit goes, at least as much as
        for those that went before; infinite for those that stay.
    """
    factor, *_ = factorised(gram, ridge)
    inverse = torch.cholesky_inverse(factor)
    weight = weight.detach().to(inverse, copy=True)
    units = units.to(inverse.device)
    alive = sorted({int(unit) for unit in units if unit >= 0})
    entries = {unit: torch.nonzero(units == unit)[:, 0] for unit in alive}
    result, highest = inverse.new_full((len(alive),), math.inf), 0.0
    at_once = math.ceil((len(alive) - width) / ROUNDS)
    while len(alive) > width:
        costs = _costs(inverse, weight, [entries[unit] for unit in alive])
        cheapest = costs.argsort(stable=True)[: min(at_once, len(alive) - width)].tolist()
        gone = torch.cat([entries[alive[index]] for index in cheapest])
        for index in cheapest:
            highest = max(highest, float(costs[index]))
            result[alive[index]] = highest
        update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weight -= weight[:, gone] @ update
        inverse -= inverse[:, gone] @ update
        alive = [unit for index, unit in enumerate(alive) if index not in set(cheapest)]
    return result


def _costs(inverse: Tensor, weight: Tensor, entries: list[Tensor]) -> Tensor:
    """What the repaired error grows by without each unit: float64 `[units]`."""
    if all(len(found) == 1 for found in entries):
        places = torch.cat(entries)
        return weight[:, places].square().sum(0) / inverse.diagonal()[places]
    blocks = torch.stack([inverse[found][:, found] for found in entries])
    slices = torch.stack([weight[:, found].T for found in entries])
    costs: Tensor = (slices * torch.linalg.solve(blocks, slices)).sum((1, 2))
    return costs


def only_consumer(model: nn.Module, structure: Structure, axis: Axis) -> Consumer | None:
    """The linear layer that consumes an axis, and the unit of each of its inputs; `None` if it is not just one."""
    from hf_prune.surgery.masking import input_dim

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
