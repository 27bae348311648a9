"""Repair a pruned model in closed form: the weights that sum over pruned units make up for what went, by least squares.

For the input x of a consumer (`down_proj`, `o_proj`, each expert) in the pruned model and the output t that it should
have, the new weight minimises Σ_tokens |t − W'x − b'|² + λ |W' − W|². Layers go in order, each on what the pruned and
repaired layers before it hand on. The target t is

- `own`: the output of the dense consumer if the dense layer were given the pruned model's hidden states (the
  symmetric form, as in OSSCAR, arXiv 2403.12983);
- `asymmetric`: the output of the dense consumer in the dense model, whose hidden states are its own;
- `residual`: that, and what the residual stream lacks when it arrives: errors of earlier layers are corrected too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from hf_prune.errors import CalibrationError, PlanError
from hf_prune.gate import positions_of
from hf_prune.layers.processes import shard_batches
from hf_prune.layers.walk import LayerProtocol, Walk
from hf_prune.layers.weights import eager_experts, evaluating
from hf_prune.plan import first_change
from hf_prune.repair.consumers import find_branches
from hf_prune.repair.end_to_end import step_end_to_end_
from hf_prune.repair.fit import LayerRepair, Repaired
from hf_prune.repair.reselect import select_repairable
from hf_prune.surgery.slicing import renumber

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from hf_prune.layers.walk import Batch
    from hf_prune.layers.work import WorkDir
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure
    from hf_prune.surgery.pruning import PrunedLayers

__all__ = ["Repaired", "check_batches", "repair_", "select_repairable"]

logger = logging.getLogger(__name__)

Target = Literal["own", "asymmetric", "residual"]
NOISE_SHAPE = (4, 32, 64)
"""Batches, windows and tokens of the hidden states that repair without data draws for each layer."""
NOISE_SCALE = 10.0
"""Their standard deviation: a norm takes it out, and what the attention adds to them stays small."""


@torch.no_grad()
def repair_(
    pruned: nn.Module,
    dense: nn.Module,
    structure: Structure,
    plan: PruningPlan,
    batches: Iterable[Batch] | None,
    *,
    target: Target = "residual",
    ridge: float = 1e-2,
    train: bool = False,
    end_to_end: bool = False,
    seed: int = 0,
    layers: PrunedLayers | None = None,
    work: WorkDir | None = None,
    protocol: LayerProtocol | None = None,
) -> dict[str, Repaired]:
    """Refit the consumers of the pruned model to the dense one. Modifies `pruned` in place; `dense` is left as it was.

    A consumer before which nothing was pruned keeps its bits, unless the step end to end is taken. Products are taken
    in float32 within a batch and added up in float64. Each layer of each model computes every calibration batch about
    once; besides the statistics of one layer, the hidden states of the calibration set and the inputs of one branch are
    held, on the CPU.

    Args:
        pruned: `apply_plan(dense, structure, plan)`.
        dense: the dense model.
        structure: its structure.
        plan: which units `pruned` kept.
        batches: `input_ids`, int64 `[B, T]`, without padding. `None` repairs without data: each layer is given normal
            noise, which is isotropic after its norm, in place of hidden states, and the target is `own`.
        target: what consumers are fitted to, see above. Consumers whose output is not added to the residual stream as
            it is (gemma's norm after it, experts weighted by a router) use `asymmetric` instead of `residual`, and
            experts always `own`.
        ridge: λ as a fraction of the mean squared norm of the inputs, 0 or more.
        train: then train all weights of each layer, from the first with a pruned unit on, towards the dense residual
            stream (`train_layer_`).
        end_to_end: at last take one step of all linear consumers at once towards what the dense model predicts
            (`step_end_to_end_`); the target is not `own`.
        seed: of the noise.
        layers: makes `pruned` layer by layer, of a model on disk; `None`: both models are in memory.
        work: keeps the hidden states after each layer, so that an interrupted repair is resumed.
        protocol: how the dense model runs its layers, if that is known.

    Returns:
        For each consumer that was repaired, by its name in the dense model, the error of its output.

    Raises:
        CalibrationError: no batch, one with padding, or activations that are not finite.
        PlanError: `own`, or no data, for a plan that prunes the hidden axis, or a plan of another model.
        StructureError: layers that hand on more than hidden states.
    """
    plan.check(structure)
    target = "own" if batches is None else target
    if target == "own" and "hidden" in plan.kept_indices:
        raise PlanError("repair target 'own' found pruned hidden channels; use 'asymmetric' or 'residual' with them.")
    data = _any_ids(dense) if batches is None else list(batches)
    walk = Walk(dense, structure.layer_paths, data, layered=True, protocol=protocol)
    check_batches(len(walk.all_ids), train=train, end_to_end=end_to_end)
    branches = {found.layer: found for found in find_branches(dense, pruned, structure, plan)}
    result: dict[str, Repaired] = {}
    generator = torch.Generator().manual_seed(seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(dense, pruned))
        if any(refit.consumer.kind == "experts" for found in branches.values() for refit in found.all()):
            stack.enter_context(eager_experts(dense, pruned))
        walk.start()
        outputs = tuple(walk.protocol.outputs[layer] for layer in branches)
        paths = [renumber(structure.layer_paths[layer], layer, structure, plan) for layer in branches]
        other = walk.through(pruned, paths, LayerProtocol(outputs, True, ""))
        other.start()
        change = first_change(structure, plan)
        fit = LayerRepair(walk, other, change, structure, plan.kept_indices, target, ridge, train)
        done = _resume(work, walk, other, generator, result)
        if layers is not None:
            for layer in range(done):
                layers.known(layer)
        for layer in tqdm(range(done, walk.num_layers), desc="repair", unit="layer", leave=False):
            if batches is None and other.hidden:  # every process draws the noise of all
                other.hidden = shard_batches([_noise(other.hidden[0], generator) for _ in walk.all_ids])
            with walk.resident(layer) if layers is None else layers.layer(layer):
                if layer in branches:
                    result.update(fit.repair(branches[layer]))
                else:
                    fit.skip(layer)
            if work is not None:
                _keep(work, layer + 1, walk, other, generator, result)
        if end_to_end and not (layers is not None and layers.rewritten()):
            divergences = step_end_to_end_(walk, other, branches.values(), layers)
            logger.info("one step end to end: divergence on held-out text %.4g, then %.4g", *divergences)
    return result


def check_batches(number: int, *, train: bool = False, end_to_end: bool = False) -> None:
    """Raise `CalibrationError` if there are too few batches for a repair (see `repair_`)."""
    least = 2 * PartialState().num_processes if train else 2 if end_to_end else 1
    if number < least:
        raise CalibrationError(
            f"repair found {number or 'no'} calibration batch, expected {least} or more"
            f"{', one of them to be held out' if least > 1 else ''}: give more calibration text, or smaller batches."
        )


def _keep(
    work: WorkDir, done: int, dense: Walk, pruned: Walk, generator: torch.Generator, result: dict[str, Repaired]
) -> None:
    tensors = {f"pruned {i}": x for i, x in enumerate(pruned.hidden)}
    both = enumerate(zip(dense.hidden, pruned.hidden, strict=True))
    tensors |= {f"dense {i}": x for i, (x, other) in both if x is not other}  # where the models still agree they share
    tensors["generator"] = generator.get_state()
    work.save_step("repair", done, tensors, {name: dataclasses.astuple(x) for name, x in result.items()})


def _resume(
    work: WorkDir | None, dense: Walk, pruned: Walk, generator: torch.Generator, result: dict[str, Repaired]
) -> int:
    """Take up where an interrupted repair was: the number of layers that are done."""
    done, tensors, note = (0, {}, {}) if work is None else work.last_step("repair")
    if not done:
        return 0
    pruned.hidden = [tensors[f"pruned {i}"] for i in range(len(pruned.hidden))]
    dense.hidden = [tensors.get(f"dense {i}", x) for i, x in enumerate(pruned.hidden)]
    generator.set_state(tensors["generator"])
    result.update({name: Repaired(*values) for name, values in note.items()})
    return done


def _any_ids(model: nn.Module) -> list[torch.Tensor]:
    """Tokens that only give the shapes of hidden states."""
    num_batches, windows, tokens = NOISE_SHAPE
    tokens = min([tokens, *positions_of(model.config).values()])
    return [torch.zeros(windows, tokens, dtype=torch.int64)] * num_batches


def _noise(hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (NOISE_SCALE * torch.randn(hidden.shape, generator=generator)).to(hidden)
