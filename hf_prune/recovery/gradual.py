"""Gradual pruning: how much goes when, and weights that stay zero until they are sliced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from hf_prune.errors import ConfigError
from hf_prune.layers.masking import along_dim, keep_mask
from hf_prune.structure import layouts as lay

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from hf_prune.config import PruningConfig
    from hf_prune.plan import PruningPlan
    from hf_prune.structure.axes import Structure

Schedule = Literal["linear", "cubic"]


def ratio_at(step: int, *, begin_step: int, end_step: int, pruning_ratio: float, schedule: Schedule) -> float:
    """Fraction that is to be masked after optimizer step `step`.

    `cubic`: r·(1 − (1 − t)³) with t from 0 at `begin_step` to 1 at `end_step` (Zhu & Gupta, arXiv 1710.01878, eq. 1,
    from a ratio of 0): fast at first, while there is much to choose from. `linear`: r·t.

    Returns:
        0 up to `begin_step`, exactly `pruning_ratio` from `end_step` on.
    """
    t = min(max((step - begin_step) / (end_step - begin_step), 0.0), 1.0)
    done = t if schedule == "linear" else 1 - (1 - t) ** 3
    return pruning_ratio * done


def check_maskable(structure: Structure, config: PruningConfig) -> None:
    """Refuse what masks cannot stand for.

    Raises:
        ConfigError: the hidden axis, which norms see whole; a search, whose dense model is trained meanwhile; or
            several steps, which are the schedule's.
    """
    if "hidden" in config.axes:
        raise ConfigError(
            "axes: found 'hidden', which cannot be masked while training (norms see every channel); "
            "use mode 'start' for it."
        )
    if "expert" in config.axes:
        raise ConfigError(
            "axes: found 'expert', which no weight of zero keeps a router from choosing; use mode 'start' for it."
        )
    if config.compares_outputs:
        raise ConfigError(
            f"allocation: found {config.allocation!r}, which compares plans with the dense model, and that changes "
            "while training; use another allocation, or mode 'start'."
        )
    if config.num_steps > 1:
        raise ConfigError(f"num_steps: found {config.num_steps}, expected 1: the schedule of the callback takes steps.")
    repair = getattr(config, "repair", "none")
    if repair != "none":
        raise ConfigError(f"repair: found {repair!r}, expected 'none': masked weights are trained, not repaired.")


class ZeroedUnits:
    """Weights of a dense model that stay zero while it trains, so that it computes what the pruned model would.

    A unit is cut off where it is consumed (its columns of `o_proj` or `down_proj`); of a layer or branch that goes all
    weights are zero. `zero_` sets them, also after each optimizer step, whatever momentum and weight decay did;
    gradient hooks keep these entries out of gradient norms and moments, as if they were not there. So a checkpoint
    holds the masked function, and any process that steps its own copy (DDP) zeroes the same.
    """

    def __init__(self, model: nn.Module, structure: Structure, plan: PruningPlan) -> None:
        self.masks: list[tuple[nn.Parameter, Tensor]] = []
        self.hooks: list[RemovableHandle] = []
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, mask in keep_masks(structure, plan).items():
            parameter = parameters[name]
            own = mask.to(parameter.device)
            self.masks.append((parameter, own))
            if parameter.requires_grad:
                hook = parameter.register_hook(lambda gradient, own=own: gradient * own)  # type: ignore[no-untyped-call]
                self.hooks.append(hook)

    @torch.no_grad()
    def zero_(self) -> None:
        """Set the masked entries to zero."""
        for parameter, mask in self.masks:
            parameter.masked_fill_(~mask, 0.0)

    def release(self) -> None:
        """Let gradients pass again."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


def keep_masks(structure: Structure, plan: PruningPlan) -> dict[str, Tensor]:
    """Parameter → bool mask that broadcasts to its shape, false where `plan` cuts a unit off from what consumes it."""
    masks: dict[str, Tensor] = {}
    for axis, kept in plan.kept_indices.items():
        if structure.axes[axis].kind == "layer":
            continue
        keep = keep_mask(structure.axes[axis].num_units, kept)
        for member in structure.members[axis]:
            if member.role != "consumer":
                continue
            layouts = structure.layouts[member.parameter]
            ids = lay.unit_ids(layouts[member.dim], axis)
            entries = along_dim((ids < 0) | keep[ids.clamp_min(0)], len(layouts), member.dim)
            masks[member.parameter] = masks[member.parameter] & entries if member.parameter in masks else entries
    whole = [("layers", layer) for layer in plan.removed_layers]
    whole += [(f"layers.{branch}", layer) for layer, branch in plan.removed_branches]
    for axis, layer in whole:
        for name in structure.parameters_of_layer(axis, layer):
            masks[name] = torch.zeros([1] * len(structure.layouts[name]), dtype=torch.bool)
    return masks
