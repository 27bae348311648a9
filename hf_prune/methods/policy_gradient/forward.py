"""Losses of many masks in few forward passes: every row of a batch carries its own mask."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from hf_prune.methods.calibration import evaluating, input_device
from hf_prune.methods.gradients import sum_over_processes
from hf_prune.structure import layouts as lay
from hf_prune.surgery.masking import masked_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hf_prune.config.policy_gradient import Reward
    from hf_prune.methods.policy_gradient.policy import Units
    from hf_prune.structure.structure import Axis, Structure


class MaskedModel:
    """Runs a dense model under masks, inside `open_model`. Each process takes its share of the windows."""

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        units: Units,
        masks: dict[str, Tensor],
        *,
        reward: Reward,
        forward_rows: int,
        sliced: Sequence[Axis] = (),
    ) -> None:
        self.model, self.structure, self.units, self._masks = model, structure, units, masks
        self.reward, self.forward_rows = reward, forward_rows
        self._sliced = {axis.name: axis for axis in sliced}

    def losses(self, windows: Tensor, masks: Tensor, windows_per_mask: int) -> Tensor:
        """Mean loss of each mask over its windows. No value is read here: only transformers looks once per pass.

        Args:
            windows: token ids, int64 `[W, T]`.
            masks: bool `[W / windows_per_mask, K, N]`.
            windows_per_mask: windows that share their masks.

        Returns:
            `[W / windows_per_mask, K]` in nats per token, float32, summed over processes: the next-token loss, or the
            Kullback-Leibler divergence from the dense model to the masked one.
        """
        device = input_device(self.model)
        state = PartialState()
        losses = torch.zeros(len(windows), masks.shape[1], device=device)
        mine = range(len(windows))[state.process_index :: state.num_processes]
        if self._sliced:
            for group, own in enumerate(masks):
                shared = [w for w in mine if w // windows_per_mask == group]
                if shared:
                    losses[shared] = self._one_mask_after_another(windows[shared].to(device), own)
        else:
            per_pass = max(1, self.forward_rows // (masks.shape[1] + (self.reward == "kl")))
            for start in range(0, len(mine), per_pass):
                part = mine[start : start + per_pass]
                # slices and views: a list of indices would be copied to the device, which waits for it
                rows = slice(part.start, part.stop, part.step)
                ids = windows[rows].to(device, non_blocking=True)
                losses[rows] = self._all_at_once(ids, torch.stack([masks[w // windows_per_mask] for w in part]))
        return sum_over_processes(losses).view(len(masks), windows_per_mask, -1).mean(1)

    def logits(self, ids: Tensor, masks: Tensor | None) -> Tensor:
        """Logits `[R, T, V]` of rows `ids` `[R, T]`, each under its row of `masks` `[R, N]` (`None`: dense)."""
        self._masks.clear()
        if masks is not None:
            self._masks.update(self.units.split(masks))
        output: Tensor = self.model(input_ids=ids, use_cache=False).logits
        self._masks.clear()
        return output

    def _all_at_once(self, ids: Tensor, masks: Tensor) -> Tensor:
        """`[W, T]` and `[W, K, N]` → `[W, K]`; for `kl` the dense model is one more row of each window."""
        if self.reward == "kl":
            masks = torch.cat([torch.ones_like(masks[:, :1]), masks], 1)
        num_windows, num_masks, _ = masks.shape
        logits = self.logits(ids.repeat_interleave(num_masks, 0), masks.flatten(0, 1))
        logits = logits.view(num_windows, num_masks, *logits.shape[1:])
        if self.reward == "lm":
            return torch.stack([_next_token(own, row.to(logits.device)) for own, row in zip(logits, ids, strict=True)])
        return torch.stack([_divergence(own[1:], own[0]) for own in logits])

    def _one_mask_after_another(self, ids: Tensor, masks: Tensor) -> Tensor:
        """`[W, T]` and `[K, N]` → `[W, K]`: the MLP weights are sliced for each mask and serve all windows."""
        parts = [ids[start : start + self.forward_rows] for start in range(0, len(ids), self.forward_rows)]
        dense = [self.logits(part, None) for part in parts] if self.reward == "kl" else []
        found = []
        for mask in masks:
            kept = self.units.split(mask)
            rows = []
            with sliced_weights(self.model, self.structure, {name: kept[name] for name in self._sliced}):
                for i, part in enumerate(parts):
                    logits = self._partly_sliced(part, mask)
                    rows += [
                        _next_token(own[None], row.to(own.device))
                        if self.reward == "lm"
                        else _divergence(own[None], dense[i][j])
                        for j, (own, row) in enumerate(zip(logits, part, strict=True))
                    ]
            found.append(torch.cat(rows))
        return torch.stack(found, 1)

    def _partly_sliced(self, ids: Tensor, mask: Tensor) -> Tensor:
        self._masks.clear()
        others = {name: part for name, part in self.units.split(mask).items() if name not in self._sliced}
        self._masks.update({name: part.expand(len(ids), -1) for name, part in others.items()})
        output: Tensor = self.model(input_ids=ids, use_cache=False).logits
        self._masks.clear()
        return output


@contextlib.contextmanager
def open_model(
    model: nn.Module,
    structure: Structure,
    units: Units,
    *,
    reward: Reward = "lm",
    forward_rows: int = 16,
    sliced_forward: bool = False,
) -> Iterator[MaskedModel]:
    """A `MaskedModel`: evaluation mode, no gradients, hooks in place; afterwards the model is as it was.

    Raises:
        StructureError: units of an axis cannot be masked row by row.
    """
    sliced = [axis for axis in units.axes if sliced_forward and _sliceable(model, structure, axis)]
    names = [axis.name for axis in units.axes if axis not in sliced]
    with evaluating(model), torch.no_grad(), masked_rows(model, structure, names) as masks:
        yield MaskedModel(model, structure, units, masks, reward=reward, forward_rows=forward_rows, sliced=sliced)


@contextlib.contextmanager
def sliced_weights(model: nn.Module, structure: Structure, keep_masks: dict[str, Tensor]) -> Iterator[None]:
    """Within, the linear layers that carry these axes hold only the kept units; then the dense weights are back."""
    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for axis, mask in keep_masks.items():
            kept = {axis: mask.nonzero()[:, 0].tolist()}
            for member in structure.members[axis]:
                path, _, name = member.parameter.rpartition(".")
                module = model.get_submodule(path)
                whole = module._parameters[name]
                assert whole is not None
                layout = structure.layouts[member.parameter][member.dim]
                index = lay.indices(layout, kept).to(whole.device)
                originals.append((module, name, whole))
                module._parameters[name] = nn.Parameter(whole.index_select(member.dim, index), requires_grad=False)
        yield
    finally:
        for module, name, whole in reversed(originals):
            module._parameters[name] = whole


def _sliceable(model: nn.Module, structure: Structure, axis: Axis) -> bool:
    """MLP channels whose every carrier is a plain linear layer, which reads its sizes off its weight."""
    members = structure.members[axis.name]
    modules = [model.get_submodule(member.parameter.rpartition(".")[0]) for member in members]
    return axis.kind == "mlp" and all(type(module) is nn.Linear for module in modules)


def _next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """`[K, T, V]` and `[T]` → `[K]`, in float32, a row at a time."""
    return torch.stack([F.cross_entropy(row[:-1].float(), ids[1:]) for row in logits])


def _divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """`[K, T, V]` and `[T, V]` → `[K]`: mean over the tokens of Σ p·(ln p − ln q), in float32."""
    log_p = dense.float().log_softmax(-1)
    p = log_p.exp()
    negative_entropy = (p * log_p).sum(-1)
    found = []
    for row in logits:
        row = row.float()
        found.append((negative_entropy - (p * row).sum(-1) + row.logsumexp(-1)).mean())
    return torch.stack(found)
