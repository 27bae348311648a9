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
import logging
from typing import TYPE_CHECKING, Literal

import torch
from tqdm.auto import tqdm

from hf_prune.errors import CalibrationError, PlanError
from hf_prune.methods.calibration import Batch, checked_ids, eager_experts, evaluating
from hf_prune.methods.streams import Stream
from hf_prune.surgery.repair.consumers import find_branches, first_change
from hf_prune.surgery.repair.layers import LayerRepair, Repaired
from hf_prune.surgery.repair.selection import select_repairable
from hf_prune.surgery.slicing import renumber

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from hf_prune.plan import PruningPlan
    from hf_prune.structure.structure import Structure

__all__ = ["Repaired", "repair_", "select_repairable"]

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
    seed: int = 0,
) -> dict[str, Repaired]:
    """Refit the consumers of the pruned model to the dense one. Modifies `pruned` in place; `dense` is left as it was.

    A consumer before which nothing was pruned keeps its bits. Products are taken in float32 within a batch and added
    up in float64. Each layer of each model computes every calibration batch about once; besides the statistics of one
    layer, the hidden states of the calibration set and the inputs of one branch are held, on the CPU.

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
        seed: of the noise.

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
    ids = _any_ids(dense) if batches is None else [checked_ids(batch) for batch in batches]
    if not ids:
        raise CalibrationError("repair found no calibration batch, expected one or more: give a calibration text.")
    layers = {found.layer: found for found in find_branches(dense, pruned, structure, plan)}
    paths = [renumber(structure.layer_paths[layer], layer, structure, plan) for layer in layers]
    result: dict[str, Repaired] = {}
    generator = torch.Generator().manual_seed(seed)
    with contextlib.ExitStack() as stack:
        for model in (dense, pruned):
            stack.enter_context(evaluating(model))
            if any(consumer.kind == "experts" for found in layers.values() for consumer in found.all()):
                stack.enter_context(eager_experts(model))
        streams = _streams(dense, pruned, structure.layer_paths, paths, ids)
        walk = LayerRepair(*streams, first_change(structure, plan), plan.kept_indices.get("hidden"), target, ridge)
        for layer in tqdm(range(len(structure.layer_paths)), desc="repair", unit="layer", leave=False):
            if batches is None:
                streams[1].hidden = [_noise(hidden, generator) for hidden in streams[1].hidden]
            if layer in layers:
                result.update(walk.repair(layers[layer]))
            else:
                walk.skip(layer)
    return result


def _any_ids(model: nn.Module) -> list[torch.Tensor]:
    """Tokens that only give the shapes of hidden states."""
    num_batches, windows, tokens = NOISE_SHAPE
    longest = getattr(model.config, "max_position_embeddings", None) or tokens
    return [torch.zeros(windows, min(tokens, longest), dtype=torch.int64)] * num_batches


def _noise(hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (NOISE_SCALE * torch.randn(hidden.shape, generator=generator)).to(hidden)


def _streams(
    dense: nn.Module, pruned: nn.Module, dense_paths: Sequence[str], paths: Sequence[str], ids: list[torch.Tensor]
) -> tuple[Stream, Stream]:
    streams = Stream(dense, dense_paths), Stream(pruned, paths)
    for stream in streams:
        stream.start(ids)
    return streams
