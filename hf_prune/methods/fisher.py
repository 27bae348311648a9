"""Fisher information of the unit masks: how much the loss would change if a unit were scaled down.

Put a mask `m_u = 1` on unit u where it is consumed (the input x of `down_proj`, of `o_proj`). Its derivative on sample
n is `v_n = Σ_tokens Σ_{i in u} x_i · ∂L_n/∂x_i`, and the empirical Fisher information of the mask is the mean of `v_n²`
(as in Michel et al., arXiv 1905.10650, and Kwon et al., arXiv 2204.09656). Scores of attention and MLP units are in the
same unit, loss squared, so they compare directly. One backward pass, no weight gradients.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.config import PruningConfig, selected_axes
from hf_prune.errors import StructureError
from hf_prune.methods.gradients import backward, differentiable, loss_scale, my_share, sum_over_processes
from hf_prune.structure import layouts as lay
from hf_prune.structure.consumers import consumer_kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hf_prune.methods.calibration import Batch
    from hf_prune.structure.structure import Axis, Member, Structure


def fisher_scores(
    model: nn.Module, structure: Structure, config: PruningConfig, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Mean over the samples of the squared derivative of the sample's mean loss by each unit's mask.

    Where no module input shows what a unit is consumed by (experts, convolutions), the same derivative is read off the
    consumer's weight: Σ w·∂L/∂w over the unit's columns, one sample at a time. A unit of a layer axis is the output of
    its attention, of its MLP, or both.

    Returns:
        float32 `[num_units]` per selected axis, on the CPU; higher = keep.
    """
    axes = selected_axes(structure, config)
    masks = _MaskGradients(model, structure, axes)
    shares = my_share(batches, per_sample=bool(masks.weights))
    with differentiable(model, masks.weights), masks.watching():
        scale = loss_scale(model, batches[0]["input_ids"], masks.weights)
        masks.scale = scale
        for ids in tqdm(shares, desc="fisher importance", unit="batch", leave=False):
            masks.start(len(ids))
            backward(model, ids, masks.weights, masks.add_weight, scale)
            masks.finish()
    num_samples = sum(len(batch["input_ids"]) for batch in batches)
    return {axis.name: sum_over_processes(masks.squares[axis.name]) / num_samples for axis in axes}


class _MaskGradients:
    """Collects v for each sample of a pass, then adds up v²."""

    def __init__(self, model: nn.Module, structure: Structure, axes: list[Axis]) -> None:
        self.model, self.structure = model, structure
        self.squares = {axis.name: torch.zeros(axis.num_units) for axis in axes}
        self.inputs: list[tuple[nn.Module, Member, str]] = []
        self.outputs: list[tuple[nn.Module, str, int]] = []
        self.weights: dict[str, nn.Parameter] = {}
        self.weight_axes: dict[str, list[tuple[Member, str]]] = {}
        self.scale = 1.0
        self.samples = 0
        self.derivatives: dict[str, Tensor] = {}
        for axis in axes:
            self._find_layers(axis) if axis.kind == "layer" else self._find_consumers(axis)

    def _find_consumers(self, axis: Axis) -> None:
        for member in self.structure.members[axis.name]:
            if member.role != "consumer":
                continue
            module = self.model.get_submodule(member.parameter.rpartition(".")[0])
            if consumer_kind(module, member) == "linear":
                self.inputs.append((module, member, axis.name))
            else:
                self.weights[member.parameter] = self.model.get_parameter(member.parameter)
                self.weight_axes.setdefault(member.parameter, []).append((member, axis.name))

    def _find_layers(self, axis: Axis) -> None:
        for branch in ("attention", "mlp") if axis.name == "layers" else (axis.name.partition(".")[2],):
            for layer, path in enumerate(self.structure.layer_paths):
                module = self.structure.branch_modules.get(f"layers.{layer}.{branch}")
                if module is None:
                    raise StructureError(
                        f"the {branch} of layer {layer} is not one module; 'fisher' cannot score {axis.name}."
                    )
                self.outputs.append((self.model.get_submodule(f"{path}.{module.path}"), axis.name, layer))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the consumers and on the branches."""
        with contextlib.ExitStack() as stack:
            for module, member, axis in self.inputs:
                layout = self.structure.layouts[member.parameter][member.dim]
                ids = lay.unit_ids(layout, axis)
                stack.callback(module.register_forward_pre_hook(partial(self._watch_input, axis, ids)).remove)
            for module, axis, layer in self.outputs:
                stack.callback(module.register_forward_hook(partial(self._watch_output, axis, layer)).remove)
            yield

    def start(self, samples: int) -> None:
        """Begin a pass over so many samples."""
        self.samples, self.derivatives = samples, {}

    def finish(self) -> None:
        """Square the derivatives of the pass."""
        for axis, v in self.derivatives.items():
            self.squares[axis] += v.square().sum(0).cpu()
        self.derivatives = {}

    def _watch_input(self, axis: str, ids: Tensor, module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if not x.requires_grad:  # the first of the two forward passes of gradient checkpointing
            return None
        alias = x.view_as(x)  # its gradient comes through this consumer alone
        saved = x.detach()
        alias.register_hook(lambda gradient: self._add_input(axis, ids, saved, gradient))
        return (alias, *args[1:])

    def _add_input(self, axis: str, ids: Tensor, x: Tensor, gradient: Tensor) -> None:
        if self.samples == 0:  # the trial pass for the loss scale
            return
        x, gradient = (t.reshape(self.samples, -1, t.shape[-1]).float() for t in (x, gradient))
        product = (x * gradient).sum(1) / self.scale
        ids = ids.to(product.device)
        v = product.new_zeros(self.samples, self.squares[axis].numel())
        self._add(axis, v.index_add_(1, ids[ids >= 0], product[:, ids >= 0]))

    def _watch_output(self, axis: str, layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not hidden.requires_grad:
            return output
        alias = hidden.view_as(hidden)
        saved = hidden.detach()
        alias.register_hook(lambda gradient: self._add_output(axis, layer, saved, gradient))
        return (alias, *output[1:]) if isinstance(output, tuple) else alias

    def _add_output(self, axis: str, layer: int, hidden: Tensor, gradient: Tensor) -> None:
        if self.samples == 0:
            return
        product = (hidden.float() * gradient.float()).reshape(self.samples, -1).sum(1) / self.scale
        v = product.new_zeros(self.samples, self.squares[axis].numel())
        v[:, layer] = product
        self._add(axis, v)

    def add_weight(self, name: str, gradient: Tensor) -> None:
        """The derivative by the masks from a consumer's weight: one sample per pass."""
        if self.samples == 0:
            return
        product = self.weights[name].detach().float() * gradient.float()
        for member, axis in self.weight_axes[name]:
            own = self.structure.layouts[name][member.dim]
            self._add(axis, lay.reduce_dim(product, own, member.dim, axis)[None])

    def _add(self, axis: str, v: Tensor) -> None:
        found = self.derivatives.get(axis)
        self.derivatives[axis] = v if found is None else found + v.to(found.device)
