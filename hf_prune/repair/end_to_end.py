"""One step of all repaired weights at once, towards what the dense model predicts.

Layer by layer, repair keeps the residual stream as it was, whatever of it the predictions depend on. So afterwards one
backward pass takes g, the gradient of KL(dense ‖ pruned) by the output of each linear consumer, and the step is the
ridge regression of g on the consumer's inputs, over the mean square of g: natural gradient with Kronecker factors
(K-FAC, arXiv 1503.05671), of which the one of the outputs is a number. How far to go, held-out text decides.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_prune.layers.losses import divergence, precision
from hf_prune.layers.processes import of_main_process, shard_batches, sum_numbers
from hf_prune.layers.statistics import Statistics, is_held_out, solve_, solving
from hf_prune.layers.walk import Outputs
from hf_prune.layers.work import read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from hf_prune.layers.walk import Found, Part, Walk
    from hf_prune.repair.consumers import Branches, Refit
    from hf_prune.surgery.pruning import PrunedLayers

RIDGE = 0.3
"""Of the regression, as a fraction of the mean square of the inputs."""
FIRST_STEP, STEP_GROWTH = 0.01, 3.0
"""Steps that are tried, as fractions of the one that the slope says would leave no divergence: the first, and so many
times the one before, until held-out text no longer gains."""


def step_end_to_end_(
    dense: Walk, pruned: Walk, branches: Iterable[Branches], layers: PrunedLayers | None = None
) -> tuple[float, float]:
    """Lower the divergence of the pruned model from the dense one by one step of its linear consumers.

    Args:
        dense: with the hidden states after the last layer.
        pruned: of the same batches, two or more; its model is changed in place.
        branches: its consumers, of each layer.
        layers: made the pruned model; of a model on disk its layers are written once more in the end.

    Returns:
        The divergence on held-out text before and after, in nats per token.

    Raises:
        CalibrationError: gradients that are not finite.
    """
    on_disk = layers if layers is not None and layers.open() else None
    every, known = pruned.ids, dense.hidden
    # some batches tell how far to go, at least the last one: the same ones whatever the processes
    held_out = is_held_out(0, len(pruned.all_ids))
    held_out[-1] |= not held_out.any()
    told = shard_batches(held_out.tolist())
    teachers = {id(ids): Outputs(dense, ids, hidden, None) for ids, hidden in zip(every, known, strict=True)}
    with contextlib.ExitStack() as stack:
        steps = _Steps(branches, None if on_disk is None else stack.enter_context(on_disk.beside()))
        stack.callback(setattr, pruned, "ids", every)
        stack.callback(setattr, pruned, "teachers", {})
        pruned.ids, pruned.teachers = [ids for ids, tells in zip(every, told, strict=True) if not tells], teachers
        pruned.backward(partial(steps.find, pruned), "end to end", layered=True)
        pruned.ids = [ids for ids, tells in zip(every, told, strict=True) if tells]
        before = best = _divergence(pruned, teachers)
        size = of_main_process(FIRST_STEP * before / steps.slope if steps.slope else 0.0)
        taken = 0.0
        if on_disk is not None:
            pruned.loaded = steps.take_
            stack.callback(setattr, pruned, "loaded", None)
        while size:
            steps.go_(size)
            found = _divergence(pruned, teachers)
            if not of_main_process(found < best):
                break
            best, taken, size = found, size, size * STEP_GROWTH
        steps.go_(taken)
        if on_disk is not None and taken:
            on_disk.rewrite(steps.take_)
        return before, best


class _Steps:
    """What a step of size 1 adds to each consumer: `[D, K]`, float32 at least, on the CPU.

    Args:
        branches: the consumers.
        folder: keeps the steps of a model on disk, whose layers are changed when they are loaded; `None`: in memory,
            with the weights that there were.
    """

    def __init__(self, branches: Iterable[Branches], folder: Path | None) -> None:
        self.slope = 0.0
        """By how much the divergence of a token falls in a step of size 1, were it to go on as it begins."""
        self._refits: dict[int, list[Refit]] = {}
        for found in branches:
            linear = [refit for refit in found.all() if refit.pruned is not None and refit.consumer.kind == "linear"]
            self._refits[found.pruned_layer] = linear
        self._folder, self._size = folder, 0.0
        self._known: dict[Refit, tuple[Tensor, Tensor]] = {}

    def find(self, pruned: Walk, part: Part) -> Found:
        """The steps of one layer, from its inputs and gradients."""
        assert part.layer is not None
        sums = {}
        for refit in self._refits[part.layer]:
            num_outputs, num_inputs = refit.consumer.matrix(refit.weight).shape
            sums[refit] = Statistics(num_inputs, num_outputs, refit.weight.device)

        @contextlib.contextmanager
        def each(batch: int) -> Iterator[None]:
            # the loss of a walk is a mean over the tokens of a sample, here each token counts alike
            factor = (pruned.ids[batch].shape[1] - 1) / pruned.scale
            with contextlib.ExitStack() as stack:
                for refit, own in sums.items():
                    assert refit.pruned is not None
                    stack.callback(refit.pruned.register_forward_hook(partial(_watch, own, factor)).remove)
                yield

        part.run(each)
        steps = {}
        for refit, own in sums.items():
            total, weight = own.over_processes(), refit.consumer.matrix(refit.weight)
            scale = total.squares / max(total.num_tokens, 1) / len(weight)
            if scale:
                with solving(refit.name):
                    found = solve_(total, torch.zeros_like(weight), None, RIDGE)
                wide = precision(weight)
                steps[refit] = (-found.weight / scale).to("cpu", wide)
                self.slope += (found.error_before - found.error_after) / scale
                if self._folder is None:
                    self._known[refit] = weight.detach().to("cpu", wide, copy=True), steps[refit]
        if self._folder is not None:
            write_tensors(self._file(part.layer), {refit.name: step for refit, step in steps.items()})
        return {}

    @torch.no_grad()
    def go_(self, size: float) -> None:
        """Go so far from where the weights were; on disk when a layer is loaded."""
        self._size = size
        for refit, (weight, step) in self._known.items():
            refit.write_(weight + size * step)

    @torch.no_grad()
    def take_(self, layer: int) -> None:
        """Change a layer on disk, whose weights have just been loaded."""
        if self._size:
            steps, _ = read_tensors(self._file(layer))
            for refit in self._refits[layer]:
                if (step := steps.get(refit.name)) is not None:
                    weight = refit.consumer.matrix(refit.weight).to("cpu", step.dtype)
                    refit.write_(weight + self._size * step)

    def _file(self, layer: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{layer:05}.safetensors"


def _watch(sums: Statistics, factor: float, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Add inputs and gradients of a consumer, these times `factor`."""
    if output.requires_grad:
        inputs = args[0].detach()
        output.register_hook(lambda g: sums.add(inputs, g.to(precision(g)) * factor))  # type: ignore[no-untyped-call]


@torch.no_grad()
def _divergence(pruned: Walk, teachers: Mapping[int, Outputs]) -> float:
    """Mean over the tokens of all processes, in nats."""
    total = tokens = 0.0
    for outputs in pruned.outputs():
        for (*_, ours), (*_, theirs) in zip(outputs.chunks(), teachers[id(outputs.ids)].chunks(), strict=True):
            total += float(divergence(theirs, ours).sum(dtype=torch.float64))
            tokens += len(ours)
    total, tokens = sum_numbers(total, tokens)
    return total / tokens
