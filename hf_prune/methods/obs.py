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
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.config import OBSConfig, PruningConfig, selected_axes
from hf_prune.errors import CalibrationError, StructureError
from hf_prune.least_squares import Statistics
from hf_prune.methods.calibration import StackedInputs, checked_ids, eager_experts, evaluating
from hf_prune.methods.elimination import removal_costs
from hf_prune.methods.gradients import backward, differentiable, loss_scale, my_share, sum_over_processes
from hf_prune.methods.streams import Stream
from hf_prune.structure import layouts as lay
from hf_prune.structure.consumers import consumer_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from hf_prune.methods.calibration import Batch
    from hf_prune.structure.structure import Axis, Structure


@dataclass(frozen=True, eq=False)
class Consumer:
    """The only weight that sums over an axis: of a linear layer, or of all experts of a layer."""

    parameter: str
    module: nn.Module
    """Holds the weight."""
    dim: int
    """Of the weight, along which it sums."""
    units: Tensor
    """int64 `[K]`: the unit of each input, -1 where it has none."""

    @property
    def weight(self) -> nn.Parameter:
        """`[D, K]` or `[K, D]`, for experts with one dimension more in front."""
        return self.module.get_parameter(self.parameter.rpartition(".")[2])

    @property
    def bias(self) -> Tensor | None:
        """Of a linear layer; those of experts stay out of account."""
        found = getattr(self.module, "bias", None)
        return found if isinstance(found, Tensor) and not self.stacked else None

    @property
    def stacked(self) -> bool:
        """Whether it is a weight of experts."""
        return self.weight.dim() == 3

    def matrices(self) -> list[Tensor]:
        """`[D, K]`, one per expert."""
        weights = list(self.weight.detach()) if self.stacked else [self.weight.detach()]
        transposed = self.dim == (1 if self.stacked else 0)
        return [weight.T for weight in weights] if transposed else weights


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
    layer by layer, for H: memory is that of the consumers of one layer, a few times their Gram matrix in float64. Each
    expert has an H of its own, over the tokens routed to it. With several processes the backward pass is shared; H is
    summed by each.

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
        StructureError: an axis that is not consumed by one linear layer or by experts, or layers that hand on more than
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
                f"{axis.name}: 'obs' scores axes that one linear layer or the experts of a layer consume, and found "
                "something else (a convolution). Protect this axis, or use method 'llm_pruner'."
            )
        consumers[axis.name] = found
    ids = [checked_ids(batch) for batch in batches]
    num_tokens = sum(batch.numel() for batch in ids)
    scores: dict[str, Tensor] = {}
    with eager_experts(model):
        gradients = squared_gradients(model, consumers, batches)
        with torch.no_grad(), evaluating(model):
            stream = Stream(model, structure.layer_paths)
            stream.start(ids)
            for layer in tqdm(range(len(structure.layer_paths)), desc="obs importance", unit="layer", leave=False):
                here = {name: found for name, found in consumers.items() if structure.axes[name].layer == layer}
                for name, sums in collect_grams(stream, layer, here).items():
                    worth = (gradients[name] / (2 * num_tokens)).tolist()
                    costs = costs_of(here[name], sums, 0, config.repair_ridge, config.shrinkage, worth)
                    scores[name] = costs.float().cpu()
    return {name: scores[name] for name in consumers}


def squared_gradients(
    model: nn.Module, consumers: Mapping[str, Consumer], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Mean square of the gradient of the summed loss by the output of each consumer: float64 `[1]`, or `[experts]`.

    Over the channels and the tokens; for an expert those routed to it, its output before it is weighted.
    """
    totals = {name: torch.zeros(2, len(found.matrices()), dtype=torch.float64) for name, found in consumers.items()}
    factor = 0.0

    def watch(name: str, first: int, used: int, output: Tensor) -> None:
        if output.requires_grad:  # not in the first of the two forward passes of gradient checkpointing
            output.register_hook(partial(take, name, first, used))  # type: ignore[no-untyped-call]

    def take(name: str, first: int, used: int, gradient: Tensor) -> None:
        rows = (gradient.float() * factor).reshape(used, -1)
        totals[name][0, first : first + used] += rows.square().sum(1, dtype=torch.float64).cpu()
        totals[name][1, first : first + used] += rows.shape[1]

    with differentiable(model, {}):
        scale = loss_scale(model, checked_ids(batches[0]), {})
        with _watching(consumers, see_output=watch):
            for ids in tqdm(my_share(batches, per_sample=False), desc="gradients", unit="batch", leave=False):
                factor = (ids.shape[1] - 1) / scale  # the loss of `backward` is a mean over tokens
                backward(model, ids, {}, lambda *_: None, scale)
    sums = {name: sum_over_processes(found) for name, found in totals.items()}
    return {name: found[0] / found[1].clamp_min(1) for name, found in sums.items()}


@contextlib.contextmanager
def _watching(
    consumers: Mapping[str, Consumer],
    see: Callable[[str, int, Tensor], None] | None = None,
    see_output: Callable[[str, int, int, Tensor], None] | None = None,
) -> Iterator[None]:
    """Show what consumers are given and give, as `StackedInputs` does for experts; a linear layer is one expert."""
    stacked = {name: (found.weight, found.dim) for name, found in consumers.items() if found.stacked}
    with contextlib.ExitStack() as stack:
        for name in consumers.keys() - stacked.keys():
            module = consumers[name].module
            if see is not None:
                stack.callback(module.register_forward_pre_hook(partial(_given, see, name)).remove)
            if see_output is not None:
                stack.callback(module.register_forward_hook(partial(_gives, see_output, name)).remove)
        if stacked:
            stack.enter_context(StackedInputs(stacked, see, see_output))
        yield


def _given(see: Callable[[str, int, Tensor], None], name: str, _: nn.Module, args: tuple[Any, ...]) -> None:
    see(name, 0, args[0][None])


def _gives(
    see: Callable[[str, int, int, Tensor], None], name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    see(name, 0, 1, output)


def costs_of(
    consumer: Consumer,
    statistics: Sequence[Statistics],
    width: int,
    ridge: float,
    shrinkage: float = 0.0,
    worth: Sequence[float] | None = None,
) -> Tensor:
    """`removal_costs` of the axis of a consumer, with (1 − shrinkage) H + shrinkage · diag H in place of H."""
    grams = (_shrunk(found.symmetric_gram(consumer.bias is not None), shrinkage) for found in statistics)
    return removal_costs(grams, consumer.matrices(), consumer.units, width, ridge, worth or [1.0] * len(statistics))


def _shrunk(gram: Tensor, shrinkage: float) -> Tensor:
    """In place, towards its diagonal."""
    diagonal = gram.diagonal().clone()
    gram.mul_(1 - shrinkage).diagonal().copy_(diagonal)
    return gram


def only_consumer(model: nn.Module, structure: Structure, axis: Axis) -> Consumer | None:
    """What consumes an attention or MLP axis; `None` if that is neither just one linear layer nor experts."""
    members = [member for member in structure.members[axis.name] if member.role == "consumer"]
    if len(members) != 1 or axis.kind not in ("attention", "mlp"):
        return None
    name, dim = members[0].parameter, members[0].dim
    module = model.get_submodule(name.rpartition(".")[0])
    if consumer_kind(module, members[0]) is None:
        return None
    return Consumer(name, module, dim, lay.unit_ids(structure.layouts[name][dim], axis.name))


def collect_grams(stream: Stream, layer: int, consumers: Mapping[str, Consumer]) -> dict[str, list[Statistics]]:
    """Sums over the inputs of consumers (of each of their experts), while the hidden states go through their layer.

    Consumers that were given nothing are left out.
    """
    grams: dict[str, list[Statistics]] = {}

    def add(name: str, first: int, x: Tensor) -> None:
        if name not in grams:
            grams[name] = [Statistics(x.shape[-1], 0, x.device) for _ in consumers[name].matrices()]
        for statistics, own in zip(grams[name][first:], x, strict=False):
            statistics.add(own, own.new_zeros(*own.shape[:-1], 0))

    with _watching(consumers, add):
        for batch, hidden in enumerate(stream.hidden):
            stream.hidden[batch] = stream.run(layer, batch, hidden)
    return grams
