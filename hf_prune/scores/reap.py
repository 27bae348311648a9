"""Scores of whole experts from one forward pass: what they are sent, and what they add to the residual stream."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from torch import Tensor, nn

from hf_prune.config import PruningConfig, REAPConfig, selected_axes
from hf_prune.layers.processes import sum_over_processes
from hf_prune.layers.routing import watching_choices

if TYPE_CHECKING:
    from hf_prune.layers.routing import Choice
    from hf_prune.layers.walk import Found, Part, Walk
    from hf_prune.structure.axes import Structure


def reap_scores(
    walk: Walk, structure: Structure, config: PruningConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """What each expert j adds, by `criterion`, with g the gate that multiplies its output f(t) for a token t.

    `mean`, Σ g·‖f(t)‖₂ over the tokens that are sent to j, divided by their number (REAP, arXiv 2510.13999, eq. 9);
    `sum`, the same sum; `frequency`, their number; `max`, the largest g·‖f(t)‖₂. 0 for an expert without tokens.
    The experts' forward runs twice. Sums are float64. Deterministic.

    Returns:
        float32 `[num_units]` per selected axis, on the CPU.

    Raises:
        StructureError: experts whose gates cannot be watched (see `watching_choices`).
    """
    assert isinstance(config, REAPConfig)
    axes = selected_axes(structure, config)

    def visit(part: Part) -> Found:
        found: Found = {}
        with contextlib.ExitStack() as stack:
            for axis in axes:
                if axis.layer is not None and part.has_layer(axis.layer):
                    sums = found[axis.name] = torch.zeros(3, axis.num_units, dtype=torch.float64)
                    see = partial(_add, sums)
                    stack.enter_context(watching_choices(walk.model, structure, axis.name, given=see))
            part.run()
        return found

    found = walk.forward(visit, "reap")
    scores = {}
    for axis in axes:
        state = PartialState()
        largest = torch.zeros(state.num_processes, axis.num_units, dtype=torch.float64)
        largest[state.process_index] = found[axis.name][2]
        number, total = sum_over_processes(found[axis.name][:2])
        chosen = {
            "mean": total / number.clamp_min(1),
            "sum": total,
            "frequency": number,
            "max": sum_over_processes(largest).amax(0),
        }
        scores[axis.name] = chosen[config.criterion].float()
    return scores


def _add(sums: Tensor, experts: nn.Module, choice: Choice) -> None:
    """Number of tokens, Σ and largest g·‖f‖ of each expert; the outputs are those of the module for gates of one."""
    hidden, chosen, gates = choice
    for k in range(chosen.shape[1]):
        one, gate = chosen[:, k : k + 1].contiguous(), gates[:, k : k + 1]
        output = experts.forward(hidden, one, torch.ones_like(gate))  # not its hooks
        values = (gate[:, 0].double() * output.norm(dim=-1, dtype=torch.float64)).cpu()
        ids = one[:, 0].cpu()
        sums[0].index_add_(0, ids, torch.ones_like(values))
        sums[1].index_add_(0, ids, values)
        sums[2].scatter_reduce_(0, ids, values, "amax")
