"""Fisher information of the unit masks: how much the loss would change if a unit were scaled down.

Put a mask `m_u = 1` on unit u where it is consumed (the input x of `down_proj`, of `o_proj`). Its derivative on sample
n is `v_n = Σ_tokens Σ_{i in u} x_i · ∂L_n/∂x_i`, and the empirical Fisher information of the mask is the mean of `v_n²`
(as in Michel et al., arXiv 1905.10650, and Kwon et al., arXiv 2204.09656). Scores of attention and MLP units are in the
same unit, loss squared, so they compare directly. One backward pass, no weight gradients. The mask of an expert is on
its gate: v_n = Σ_tokens g · ∂L_n/∂g over the tokens that are sent to it.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.config import PruningConfig, selected_axes
from hf_prune.errors import StructureError
from hf_prune.layers.processes import sum_over_processes
from hf_prune.layers.routing import watching_choices
from hf_prune.layers.walk import hidden_of, with_hidden
from hf_prune.layers.watch import watching
from hf_prune.structure import layouts as lay
from hf_prune.structure.consumers import Consumer, consumers_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_prune.layers.routing import Choice
    from hf_prune.layers.walk import Found, Part, Walk
    from hf_prune.structure.axes import Axis, Structure


def fisher_scores(walk: Walk, structure: Structure, config: PruningConfig) -> dict[str, Tensor]:
    """Mean over the samples of the squared derivative of the sample's mean loss by each unit's mask.

    Where no module input shows what a unit is consumed by (experts, convolutions), the same derivative is read off the
    consumer's weight: Σ w·∂L/∂w over the unit's columns, one sample at a time. A unit of a layer axis is the output of
    its attention, of its MLP, or both.

    Returns:
        float32 `[num_units]` per selected axis, on the CPU; higher = keep.
    """
    axes = selected_axes(structure, config)
    inputs: list[Consumer] = []
    weights: dict[str, list[Consumer]] = {}
    outputs: list[tuple[str, str, int]] = []
    for axis in axes:
        if axis.kind == "layer":
            outputs += _branch_outputs(structure, axis)
        at_consumers = axis.kind not in ("layer", "expert")
        for consumer in consumers_of(walk.model, structure, axis.name) if at_consumers else ():
            if consumer.kind == "linear":
                inputs.append(consumer)
            else:
                weights.setdefault(consumer.parameter, []).append(consumer)
    walk = walk.per_sample() if weights else walk
    masks = _MaskGradients(walk, structure, axes, inputs, weights, outputs)
    outside = any(walk.layer_of(consumer.parameter) is None for consumer in inputs)
    found = walk.backward(
        masks.visit, "fisher importance", wanted=list(weights), consume=masks.add_weight, outside=outside
    )
    for axis in axes:
        if axis.kind == "hidden":  # its units are in all parts: squared once these are added up, in a fixed order
            parts = [found[key] for key in sorted(found) if key.startswith(f"{axis.name}@")]
            found[axis.name] = torch.stack(parts).sum(0).square().sum(0) if parts else torch.zeros(axis.num_units)
    return {axis.name: sum_over_processes(found[axis.name]) / walk.num_samples for axis in axes}


def _branch_outputs(structure: Structure, axis: Axis) -> list[tuple[str, str, int]]:
    """`(module path, axis, layer)` of the branches whose outputs are the units of an axis of layers."""
    found = []
    for branch in ("attention", "mlp") if axis.name == "layers" else (axis.name.partition(".")[2],):
        for layer, path in enumerate(structure.layer_paths):
            module = structure.branch_modules.get(f"layers.{layer}.{branch}")
            if module is None:
                raise StructureError(
                    f"the {branch} of layer {layer} is not one module; 'fisher' cannot score {axis.name}."
                )
            found.append((f"{path}.{module.path}", axis.name, layer))
    return found


class _MaskGradients:
    """Collects v for each sample of a batch, then adds up v²."""

    def __init__(
        self,
        walk: Walk,
        structure: Structure,
        axes: list[Axis],
        inputs: list[Consumer],
        weights: dict[str, list[Consumer]],
        outputs: list[tuple[str, str, int]],
    ) -> None:
        self.walk, self.structure = walk, structure
        self.inputs, self.weights, self.outputs = inputs, weights, outputs
        self.num_units = {axis.name: axis.num_units for axis in axes}
        self.experts = [axis for axis in axes if axis.kind == "expert"]
        self.spread = {axis.name for axis in axes if axis.kind == "hidden"}
        self.units = {consumer: consumer.units(structure) for consumer in inputs}
        self.samples = 0
        self.derivatives: dict[str, Tensor] = {}

    def visit(self, part: Part) -> Found:
        """Sums of v² over the batches, of the axes that have units in this part."""
        model = self.walk.model
        found: Found = {}
        here = [consumer for consumer in self.inputs if part.holds(consumer.parameter)]
        names = {consumer.axis for consumer in here}
        names |= {one.axis for name, own in self.weights.items() if part.holds(name) for one in own}
        with contextlib.ExitStack() as stack:
            stack.enter_context(watching(model, here, input_gradient=self._add_input))
            for path, axis, layer in self.outputs:
                if part.has_layer(layer):
                    names.add(axis)
                    hook = partial(self._watch_output, axis, layer)
                    stack.callback(model.get_submodule(path).register_forward_hook(hook).remove)
            for expert_axis in self.experts:
                if expert_axis.layer is not None and part.has_layer(expert_axis.layer):
                    names.add(expert_axis.name)
                    see = partial(self._add_gates, expert_axis.name)
                    stack.enter_context(watching_choices(model, self.structure, expert_axis.name, gradient=see))
            found.update({name: torch.zeros(self.num_units[name]) for name in names - self.spread})
            part.run(partial(self._batch, found))
        return found

    @contextlib.contextmanager
    def _batch(self, found: Found, batch: int) -> Iterator[None]:
        self.samples, self.derivatives = len(self.walk.ids[batch]), {}
        yield
        for key, v in self.derivatives.items():
            axis = key.partition("@")[0]
            if axis in self.spread:
                found[key] = torch.cat([found[key], v.cpu()]) if key in found else v.cpu()
            else:
                found[axis] += v.square().sum(0).cpu()
        self.samples, self.derivatives = 0, {}

    def _add_input(self, consumer: Consumer, x: Tensor, gradient: Tensor) -> None:
        rows = slice(None) if self.walk.row is None else slice(self.walk.row, self.walk.row + 1)
        samples = self.samples if self.walk.row is None else 1  # the head sees one sample at a time
        x, gradient = (t.reshape(samples, -1, t.shape[-1]).float() for t in (x, gradient))
        product = (x * gradient).sum(1) / self.walk.scale
        ids = self.units[consumer].to(product.device)
        v = product.new_zeros(self.samples, self.num_units[consumer.axis])
        v[rows] = v[rows].index_add(1, ids[ids >= 0], product[:, ids >= 0])
        self._add(consumer.axis, consumer.parameter, v)

    def _add_gates(self, axis: str, choice: Choice, gradient: Tensor) -> None:
        _, chosen, gates = choice
        product = (gates.float() * gradient.float()).reshape(self.samples, -1) / self.walk.scale
        v = product.new_zeros(self.samples, self.num_units[axis])
        self._add(axis, "", v.scatter_add_(1, chosen.reshape(self.samples, -1), product))

    def _watch_output(self, axis: str, layer: int, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        if not hidden.requires_grad:
            return output
        alias = hidden.view_as(hidden)
        saved = hidden.detach()
        alias.register_hook(lambda gradient: self._add_output(axis, layer, saved, gradient))  # type: ignore[no-untyped-call]
        return with_hidden(output, alias)

    def _add_output(self, axis: str, layer: int, hidden: Tensor, gradient: Tensor) -> None:
        product = (hidden.float() * gradient.float()).reshape(self.samples, -1).sum(1) / self.walk.scale
        v = product.new_zeros(self.samples, self.num_units[axis])
        v[:, layer] = product
        self._add(axis, "", v)

    def add_weight(self, name: str, gradient: Tensor) -> None:
        """The derivative by the masks from a consumer's weight: one sample per batch."""
        product = self.walk.model.get_parameter(name).detach().float() * gradient.float()
        for consumer in self.weights[name]:
            layout = self.structure.layouts[name][consumer.dim]
            self._add(consumer.axis, name, lay.reduce_dim(product, layout, consumer.dim, consumer.axis)[None])

    def _add(self, axis: str, parameter: str, v: Tensor) -> None:
        key = axis
        if axis in self.spread:
            layer = self.walk.layer_of(parameter)
            key = f"{axis}@{self.walk.num_layers if layer is None else layer:05}"
        found = self.derivatives.get(key)
        self.derivatives[key] = v if found is None else found + v.to(found.device)
